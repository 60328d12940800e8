"""Context parallel: hidden states and gradients of one process; masks, what crosses, and the partial kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model import Gemma4, Gemma4Config
from model.attention import KeyValue
from model.attention_kernels import blocked_partial, flex_call_with_lse, flex_partial_over
from model.inputs import Inputs, make_inputs
from model.masks import AttentionMask
from parallel.collectives import gather_tokens
from parallel.context.plan import ContextParallel, RingMask, WindowMask
from parallel.world import World
from tests.harness.compare import hold, relative_error
from tests.harness.distributed import all_ranks, run_ranks
from tests.harness.report import report

B, S, IMAGE = 2, 48, 250
VARIANTS = ("e2b", "e4b", "12b", "26b_a4b", "31b", "31b with images", "31b with K not V")
TOLERANCE = 1e-10  # float64
WINDOWS = (4, 21)  # less, and with either number of ranks more, than a chunk


def small(variant: str, window: int) -> Gemma4Config:
    name, _, more = variant.partition(" with ")
    config = Gemma4Config.from_name(f"gemma4_tiny_{name}")
    shared = config.num_kv_shared_layers > 0
    return config.replace(
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6 if shared else 4,
        sliding_window_pattern=3 if shared else 2,
        num_kv_shared_layers=3 if shared else 0,
        hidden_size_per_layer_input=8 if shared else 0,
        num_attention_heads=4,
        num_global_key_value_heads=2 if name == "31b" else config.num_global_key_value_heads,
        head_dim=8,
        global_head_dim=16,
        sliding_window=window,
        image_token_id=IMAGE,
        attention_k_eq_v=config.attention_k_eq_v and more != "K not V",
        vision=config.vision if more == "images" else None,
        audio=None,
    )


@dataclass(frozen=True)
class Batch:
    """Uneven documents over every border; images over one, and over the end of a document."""

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    supervised: Tensor
    factors: Tensor

    def inputs(self, config: Gemma4Config, skip: bool = False) -> Inputs:
        return make_inputs(config, self.tokens, self.positions, self.documents, self.supervised if skip else None)

    @classmethod
    def make(cls, window: int) -> Batch:
        generator = torch.Generator().manual_seed(window)
        lengths = ((19, 1, 28), (5, 38, 5))
        documents = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        tokens = torch.randint(3, IMAGE, (B, S), generator=generator)
        tokens[0, 21:27], tokens[0, 34:40], tokens[1, 8:20], tokens[1, 40:45] = (IMAGE,) * 4
        supervised = torch.zeros(B, S, dtype=torch.bool)
        supervised[0, 2:5], supervised[1, 40:46] = True, True
        if window == WINDOWS[0]:  # leaves the last of four ranks without any, the other batch the last of two
            supervised[1, 30:36] = True
        return cls(tokens, positions, documents, supervised, torch.randn(B, S, 32, generator=generator))


def make_model(config: Gemma4Config) -> Gemma4:
    model, generator = Gemma4(config).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                scale = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def gradients(model: Gemma4) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_process(variant: str, window: int, skip: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model, batch = make_model(small(variant, window)), Batch.make(window)
    hidden = model(batch.tokens, batch.positions, batch.documents, batch.supervised if skip else None)
    (hidden * (batch.factors[batch.supervised] if skip else batch.factors)).sum().backward()
    return hidden.detach(), gradients(model)


def recompute(model: Gemma4, context: Callable[[], Any]) -> None:
    for layer in model.layers:
        again = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=context)
        layer.forward = again  # type: ignore[method-assign]


RECOMPUTE = {
    "none": lambda model: None,
    "all": lambda model: recompute(model, lambda: (nullcontext(), nullcontext())),
    "all but products": lambda model: recompute(
        model, partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.bmm.default])
    ),
}


def one_rank(variant: str, window: int, skip: bool, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
    config, batch = small(variant, window), Batch.make(window)
    model = make_model(config)
    plan = ContextParallel(config, all_ranks())
    plan.apply(model)
    RECOMPUTE[mode](model)
    supervised, factors = plan.part(batch.supervised), plan.part(batch.factors)
    hidden = model.run(plan.cut(batch.inputs(config, skip)))
    (hidden * (factors[supervised] if skip else factors)).sum().backward()
    return hidden.detach(), gradients(model)


CASES = [
    *((variant, window, True) for variant in VARIANTS for window in WINDOWS),
    *((variant, WINDOWS[1], False) for variant in ("e4b", "31b")),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_hidden_states_and_gradients_are_those_of_one_process(ranks: int) -> None:
    expected = [one_process(*case) for case in CASES]

    def run(world: World) -> list[tuple[Tensor, dict[str, Tensor]]]:
        return [one_rank(*case, mode) for case, mode in zip(CASES, cycle(RECOMPUTE), strict=False)]

    found = run_ranks(ranks, run)
    for index, (case, (whole, grads)) in enumerate(zip(CASES, expected, strict=True)):
        variant, window, skip = case
        parts = [rank[index] for rank in found]
        batch, places = Batch.make(window), torch.arange(B * S).view(B, S)
        order = torch.cat([held(places, rank, ranks).flatten() for rank in range(ranks)])
        if skip:
            assert any(len(hidden) == 0 for hidden, _ in parts) == (ranks == 4 or window == WINDOWS[1])
            order = order[batch.supervised.flatten()[order]]
        hidden = torch.cat([part.flatten(0, -2) for part, _ in parts])[order.argsort()]
        errors = [relative_error(hidden, whole.flatten(0, -2))]
        assert all(set(part) <= set(grads) for _, part in parts)
        for name, grad in grads.items():
            assert grad.norm() > 0, name
            errors.append(relative_error(torch.stack([part[name] for _, part in parts]).sum(0), grad))
            hold("context parallel, gradients, float64", errors[-1], TOLERANCE, (case, name))
        hold("context parallel, hidden states, float64", errors[0], TOLERANCE, case)
        if skip:
            report(
                "Context parallel against one process, float64, relative error",
                {
                    "variant": variant,
                    "cp": ranks,
                    "window": window,
                    "hidden": f"{errors[0]:.1e}",
                    "grads": f"{max(errors[1:]):.1e}",
                },
            )


@pytest.mark.parametrize("variant", ["e4b", "31b"])
def test_a_plain_mask_is_of_whole_sequences(variant: str) -> None:
    """Generation has such masks, and no rank waits for another there."""

    def run(world: World) -> bool:
        config = small(variant, WINDOWS[0])
        model, tokens = make_model(config), Batch.make(WINDOWS[0]).tokens
        expected = model(tokens)
        ContextParallel(config, all_ranks()).apply(model)
        return world.rank == 1 or torch.equal(model(tokens), expected)

    assert all(run_ranks(2, run))


def held(x_BS: Tensor, rank: int, ranks: int) -> Tensor:
    chunks = x_BS.chunk(2 * ranks, dim=1)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim=1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_queries_see_what_they_see_in_the_whole_and_only_that_crosses(ranks: int) -> None:
    """Keys here are places of the batch, so what comes through an exchange tells where it is from."""

    def run(world: World) -> list[dict[str, object]]:
        group, places = all_ranks(), torch.arange(B * S)
        assert group is not None
        crossed: list[dict[str, object]] = []
        for variant in ("31b with images", "e4b"):
            for window in (*WINDOWS, 1, 100):
                for documents in (Batch.make(4).documents, torch.zeros(B, S)):
                    config = small(variant, window)
                    plan = ContextParallel(config, group)
                    here = plan.part(places.view(B, S)).flatten()
                    assert torch.equal(here, held(places.view(B, S), world.rank, ranks).flatten())
                    batch = replace(Batch.make(4), documents=documents, supervised=torch.ones(B, S, dtype=torch.bool))
                    inputs = batch.inputs(config, skip=True)
                    cut = plan.cut(inputs)
                    assert cut.kept is not None and torch.equal(cut.kept.index, torch.arange(len(here)))
                    assert torch.equal(cut.tokens_T, inputs.tokens_T[here])

                    made = KeyValue(*(here[:, None, None].float(),) * 2)
                    queries = torch.arange(0, len(here), 3).repeat_interleave(2)  # some, each of them twice
                    for layer_type, mask in cut.masks.items():
                        dense = inputs.masks[layer_type].dense()
                        columns = dense.new_zeros(B * S, B * S).view(B, S, B, S)
                        for row in range(B):
                            columns[row, :, row] = dense.view(B, S, S)[row]
                        expected = columns.view(B * S, B * S)[here]
                        assert torch.equal(visible(plan, mask, made, group), expected)
                        assert torch.equal(visible(plan, mask.select(queries), made, group), expected[queries])
                        assert visible(plan, mask.select(queries[:0]), made, group).shape == (0, B * S)
                        if isinstance(mask, WindowMask):
                            foreign = expected.any(dim=0)
                            foreign[here] = False
                            assert sum(mask.receives) == int(foreign.sum()) and mask.receives[world.rank] == 0
                            if documents.any():
                                crossed.append({"keys": variant, "window": window, "received": sum(mask.receives)})
        return crossed

    found = run_ranks(ranks, run)
    for rows in zip(*found, strict=True):
        most = max(int(str(row["received"])) for row in rows)
        report("Keys a rank receives on a sliding layer, of 96", rows[0] | {"cp": ranks, "received": most})


def visible(plan: ContextParallel, mask: AttentionMask, made: KeyValue, group: dist.ProcessGroup) -> Tensor:
    """Bool [T, B * S]: the places that queries see through an exchange, or in the blocks of the ring."""
    out = torch.zeros(mask.num_queries, B * S, dtype=torch.bool)
    if isinstance(mask, RingMask):
        blocks = gather_tokens(made.k_TKH, group).chunk(plan.size)
        pairs = [(part, blocks[plan.rank - step]) for step, part in enumerate(mask.parts) if part is not None]
    else:
        pairs = [(mask, plan.exchange(made, mask).k_TKH)]
    for part, keys in pairs:
        query, key = part.dense().nonzero(as_tuple=True)
        out[query, keys.flatten().long()[part.batch_T[query] * part.num_keys + key]] = True
    return out


def partial_mask() -> AttentionMask:
    """Intervals of any kind; in row 0 a whole stretch sees nothing, and so do some queries elsewhere."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = 300, 90
    first, length = torch.randint(0, keys, (2, 2 * queries), generator=generator)
    last = (first + length).clamp_max(keys - 1)
    position = torch.arange(queries).repeat(2)
    nothing = (torch.rand(2 * queries, generator=generator) < 0.3) | (torch.arange(2 * queries) < 140)
    row = torch.arange(2).repeat_interleave(queries)
    # Positions of queries are places in a row of keys, of which there are as many in practice.
    mask = AttentionMask(
        row, position * keys // queries, first.masked_fill(nothing, keys), last.masked_fill(nothing, -1), 2, keys
    )
    return mask.select((torch.rand(2 * queries, generator=generator) < 0.8).nonzero()[:, 0])


def dense_partial(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    k, v = (t.repeat_interleave(3, dim=2)[mask.batch_T] for t in (k_BSKH, v_BSKH))
    seen = mask.dense()[:, None]
    weights = torch.einsum("tnh,tsnh->tns", q_TNH, k).exp() * seen
    total = weights.sum(-1)
    sees = seen.any(-1)
    out = torch.einsum("tns,tsnh->tnh", weights, v) / total.masked_fill(~sees, 1.0)[..., None]
    return out, total.masked_fill(~sees, 1.0).log().masked_fill(~sees, float("-inf"))


def test_the_partial_kernel_gives_output_and_log_sum_exp_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch refuses flex gradients on a CPU by this check alone; eager flex computes them all the same.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    torch.manual_seed(0)
    mask = partial_mask()
    T, (k_heads, width) = mask.num_queries, (2, 8)
    assert T > 300 and min(block.key_end - block.key_start for block in mask.blocks) > 0
    shapes = ((T, 6, width), (2, 90, k_heads, width), (2, 90, k_heads, width))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sees = mask.first_key_T <= mask.last_key_T
    # A merge gives a query without keys no weight, and so its outputs no gradient.
    grads = [t * sees.view(-1, *(1,) * (t.dim() - 1)) for t in (torch.randn(T, 6, width), torch.randn(T, 6))]
    q, k, v = inputs
    expected = dense_partial(q, k, v, mask)
    expected_grads = torch.autograd.grad(expected, inputs, grads)
    kernels: list[Callable[..., tuple[Tensor, Tensor]]] = [
        blocked_partial,
        lambda *args: flex_partial_over(flex_call_with_lse, *args),
    ]
    for kernel in kernels:
        out, lse = kernel(*inputs, mask)
        assert lse.dtype == torch.float64
        assert kernel(*(t.detach().bfloat16() for t in inputs), mask)[1].dtype == torch.float32
        assert not out[~sees].any() and bool((lse[~sees] == float("-inf")).all()) and 100 < sees.sum() < T - 100
        torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=1e-5)
        found = torch.autograd.grad((out, lse), inputs, grads)
        for a, b in zip(found, expected_grads, strict=True):
            assert relative_error(a, b) < 1e-5
        assert not found[0][~sees].any()
