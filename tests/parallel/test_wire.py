"""Bytes each rank sends in a step, counted at the dispatcher, beside the least that the plan needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch, collate
from model.moe import Experts, Router
from parallel.apply import ParallelModel, build_parallel_model
from parallel.dtensors import local_part
from parallel.expert import ParallelExperts
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.world import World
from tests.harness.distributed import run_ranks
from tests.harness.meshes import CPU, Case, initial_values, sequences, share_of, whole_batch
from tests.harness.report import report
from tests.harness.wire import WireCounter
from train.engine import Engine
from train.objective import CrossEntropy

FLOAT = 4


def step(case: Case, world: World) -> tuple[dict[tuple[str, str], int], ParallelModel, Batch]:
    """What one forward and backward over the whole batch sends, every position supervised."""
    parallel = build_parallel_model(case.config, build_mesh(CPU, case.layout), CPU, initial_values(0))
    supervised = [replace(row, labels_S=row.tokens_S) for row in sequences(case, 0)]
    batch = collate(supervised, case.config)
    with WireCounter() as counter:
        Engine(parallel, CrossEntropy(), CPU).forward_backward([batch], batch.kept.count)
    return dict(counter.sent), parallel, batch


def of_kind(sent: dict[tuple[str, str], int], wanted: str) -> int:
    return sum(count for (_, kind), count in sent.items() if kind == wanted)


def tell(what: str, sent: int, least: int, other: str = "") -> None:
    row: dict[str, object] = {"what": what, "sent": f"{sent:,}", "least": f"{least:,}", "ratio": f"{sent / least:.2f}"}
    report("Bytes a rank sends, fp32", row | {"against": other})


def test_fsdp_sends_each_shard_once_a_gather() -> None:
    case = Case("31b", Layout(dp_shard=2), steps=1)

    def on_rank(world: World) -> tuple[int, int, int, int]:
        sent, parallel, _ = step(case, world)
        layers = sum(p.numel() for p in parallel.whole.language_model.layers.parameters())
        rest = sum(p.numel() for p in parallel.whole.parameters()) - layers
        return of_kind(sent, "allgather"), of_kind(sent, "reduce_scatter"), layers, rest

    gathered, scattered, layers, rest = run_ranks(2, on_rank)[0]
    for name, sent, least in (
        ("fsdp: gathers, layers twice and the rest once", gathered, (2 * layers + rest) // 2 * FLOAT),
        ("fsdp: gradients", scattered, (layers + rest) // 2 * FLOAT),
    ):
        tell(f"{name} (dp2)", sent, least)
        assert least <= sent < 1.1 * least  # shards are padded to one size


def test_sequence_parallel_sends_a_stream_twice_a_block() -> None:
    case = Case("31b", Layout(dp_shard=2, tp=2), steps=1)
    sent, tokens = run_ranks(4, lambda world: (step(case, world)[0], case.batch_size * case.length))[0]
    hops = 2 * (2 * case.config.num_hidden_layers + 1)  # in and out of each block, forward and backward, and the ends
    least = hops * tokens // 2 * case.config.hidden_size * FLOAT
    for kind in ("allgather", "reduce_scatter"):
        tell(f"sequence parallel: {kind} (dp2 tp2)", sent[("tp", kind)], least)
        assert sent[("tp", kind)] == least
    # The loss: a sum of exponentials and a label's score for each token, never a row of the vocabulary.
    least, scores = 2 * tokens * FLOAT, tokens * case.config.vocab_size // 2 * FLOAT
    tell("vocabulary-parallel loss (dp2 tp2)", sent[("tp", "allreduce")], least, f"gathering the scores: {scores:,}")
    assert sent[("tp", "allreduce")] == least


def test_rows_of_the_per_layer_table_cross_not_the_table() -> None:
    case = Case("e4b", Layout(dp_shard=2), sizes=(("vocab_size_per_layer_input", 4096),), batch_size=2, steps=1)

    def on_rank(world: World) -> tuple[int, int]:
        parallel = build_parallel_model(case.config, build_mesh(CPU, case.layout), CPU, initial_values(0))
        batch = whole_batch(case, world.rank)
        with WireCounter() as counter:
            engine = Engine(parallel, CrossEntropy(), CPU)
            engine.forward_backward([batch], batch.kept.count)
        return of_kind(counter.sent, "alltoall"), batch.inputs.tokens_T.unique().numel()

    found = run_ranks(2, on_rank)
    width = case.config.num_hidden_layers * case.config.hidden_size_per_layer_input
    least = max(unique for _, unique in found) * width * FLOAT  # about half of the rows there, their gradients back
    table = 2 * case.config.vocab_size_per_layer_input * width * FLOAT // 2
    sent = max(sent for sent, _ in found)
    tell("per-layer rows (dp2)", sent, least, f"gathering the table, scattering its gradient: {table:,}")
    assert sent < 1.5 * least < table / 4


def test_a_first_stage_never_gathers_the_token_table() -> None:
    case = Case("31b", Layout(pp=2, dp_shard=2), sizes=(("vocab_size", 4096),), micro_batch_size=2, steps=1)

    def on_rank(world: World) -> tuple[bool, int, int, int]:
        mesh = build_mesh(CPU, case.layout)
        parallel = build_parallel_model(case.config, mesh, CPU, initial_values(0), sequence_length=case.length)
        batches = share_of(case, 0, case.layout, world.rank)
        with WireCounter() as counter:
            Engine(parallel, CrossEntropy(), CPU).forward_backward(batches, 1)
        wanted = sum(batch.inputs.tokens_T.unique().numel() for batch in batches)
        return (
            parallel.mesh.at["pp"] == 0,
            of_kind(counter.sent, "alltoall"),
            wanted,
            of_kind(counter.sent, "allgather"),
        )

    first = [found for is_first, *found in run_ranks(4, on_rank) if is_first]
    width = case.config.hidden_size * FLOAT
    least = max(wanted for _, wanted, _ in first) * width
    table = case.config.vocab_size * width // 2
    sent, _, gathered = (max(column) for column in zip(*first, strict=True))
    other = f"gathering the table, scattering its gradient: {2 * table:,}"
    tell("a first stage's token rows (pp2 dp2)", sent, least, other)
    assert sent < 1.5 * least < table / 4 and gathered < table


def test_a_token_goes_to_a_rank_once() -> None:
    config = Case("26b_a4b", sizes=(("num_experts", 16),), steps=1).config.replace(top_k_experts=4)
    ranks, tokens, width = 4, 64, config.hidden_size

    def on_rank(world: World) -> tuple[int, int, int]:
        torch.manual_seed(world.rank)
        x_TD = torch.randn(tokens, width, requires_grad=True)
        torch.manual_seed(9)
        router = Router(config)
        torch.nn.init.normal_(router.proj.weight)
        weights, indices = router(x_TD)
        mesh = build_mesh(CPU, Layout(dp_shard=ranks, ep=ranks))
        with torch.device("meta"):
            whole = Experts(config)
        experts = ParallelExperts(whole, mesh.ep)
        experts.to_empty(device="cpu")
        for parameter in experts.parameters():
            torch.nn.init.normal_(local_part(parameter), std=0.1)

        def sent(x: Tensor, w: Tensor, i: Tensor) -> Any:
            with WireCounter() as counter:
                experts(x, w, i, lambda: x)[0].sum().backward()
            return sum(counter.sent.values())

        once = sent(x_TD, weights.detach(), indices)
        each = sent(x_TD.repeat_interleave(4, 0), weights.detach().flatten()[:, None], indices.flatten()[:, None])
        owners = torch.zeros(tokens, ranks, dtype=torch.bool).scatter_(1, indices // 4, True)
        owners[:, world.rank] = False
        return once, each, int(owners.sum())

    found = run_ranks(ranks, on_rank)
    once, each, copies = (sum(column) for column in zip(*found, strict=True))
    least = copies * 4 * width * FLOAT  # there and back, forward and backward
    tell("experts, one copy a rank (ep4, all ranks)", once, least, f"one copy an expert: {each:,}")
    assert least < once < 1.3 * least and once < 0.8 * each


def test_sliding_layers_send_a_window_and_full_ones_the_sequence() -> None:
    case = Case(
        "31b", Layout(cp=4), sizes=(("sliding_window", 8), ("num_global_key_value_heads", 4)), length=128, steps=1
    )
    config = case.config

    def on_rank(world: World) -> dict[tuple[str, str], int]:
        parallel = build_parallel_model(config, build_mesh(CPU, case.layout), CPU, initial_values(0))
        tokens = torch.randint(3, 100, (1, case.length), generator=torch.Generator().manual_seed(0))
        batch = Batch.make(config, tokens, tokens, torch.arange(case.length)[None], torch.zeros_like(tokens))
        with WireCounter() as counter:
            Engine(parallel, CrossEntropy(), CPU).forward_backward([batch], case.length)
        return dict(counter.sent)

    found = run_ranks(4, on_rank)
    sliding = sum(of_kind(sent, "alltoall") for sent in found)
    full = sum(of_kind(sent, "send") for sent in found)
    per_key = dict.fromkeys(config.layer_types, 0)
    for index in range(config.num_hidden_layers):
        layer = config.layer(index)
        per_key[layer.type] += (1 if layer.k_eq_v else 2) * layer.num_kv_heads * layer.head_dim * FLOAT
    borders = 2 * 4 - 1 - 1  # the two middle chunks lie on one rank
    least = 2 * borders * (config.sliding_window - 1) * per_key["sliding_attention"]
    tell(
        "sliding layers: keys across borders (cp4, all ranks)",
        sliding,
        least,
        f"whole sequence: {full:,} in full layers",
    )
    assert sliding == least
    blocks = 3 * case.length * per_key["full_attention"]  # each block to three other ranks
    least = blocks + (3 + 4) * case.length * per_key["full_attention"]  # again in the backward, and its sums home
    assert config.attention_k_eq_v
    tell("full layers, K = V: blocks around the ring (cp4, all ranks)", full, least, f"keys and values: {2 * full:,}")
    assert full <= 1.05 * least
