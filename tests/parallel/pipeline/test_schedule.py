"""Stages and schedules against one process: every way to cut a model, every schedule over what is laid below it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch import IGNORE, Batch
from model import Gemma4
from model.init import random_fill, whole_slices
from parallel.apply import ParallelModel, build_parallel_model
from parallel.collectives import send_recv
from parallel.dtensors import local_part
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.pipeline.layout import SCHEDULES
from parallel.pipeline.stage import Gemma4Stage, carried_types, shapes_at
from parallel.world import World
from tests.harness.compare import hold, relative_error
from tests.harness.distributed import run_ranks
from tests.harness.media_batches import ROWS, batches, config_of
from tests.harness.meshes import (
    CPU,
    GRADIENTS_WITHIN,
    VARIANTS,
    Case,
    Errors,
    gradient_errors,
    initial_values,
    plans,
    reference,
    sequences,
    share_of,
    train,
    whole_batch,
    worst_of,
)
from tests.harness.report import report
from train.config import OptimizerConfig
from train.engine import Engine
from train.objective import CrossEntropy, cross_entropy
from train.optimizer import build_optimizer

TABLE = "language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def slow_imports() -> None:
    """Once here, not in every rank."""
    import torchtitan.distributed.activation_checkpoint  # noqa: F401

    import parallel.pipeline.schedule  # noqa: F401


def through(stages: list[Gemma4Stage], batch: Batch) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """The loss of a batch that goes through all stages in this process, and what crossed each border."""
    out: Any = (torch.zeros(1, dtype=torch.float64),)
    crossed = []
    for stage in stages:
        stage.micro_batches = [batch.inputs]
        stage.loss = lambda hidden_TD, head, weight_VD, number: CrossEntropy()(hidden_TD, head, weight_VD, batch).total
        out = stage(*out, number=torch.tensor([0]))
        if not stage.is_last:
            crossed.append(out)
    return out.sum(), crossed


@pytest.mark.parametrize("variant", VARIANTS)
def test_wherever_a_model_is_cut_it_computes_the_same(variant: str) -> None:
    """All eight ways to cut four layers, one of which is not to; shapes at borders are those foretold."""
    case = Case(variant, steps=1)
    config, batch = case.config, whole_batch(case, 0)
    whole = Gemma4(config).double()
    initial_values(0)(whole_slices(whole))
    expected = cross_entropy(whole, batch).total
    expected.backward()
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    count, state = config.num_hidden_layers, whole.state_dict()
    for borders in (b for size in range(count) for b in combinations(range(1, count), size)):
        spans = [range(a, b) for a, b in zip((0, *borders), (*borders, count), strict=True)]
        stages = [Gemma4Stage(config, span).double() for span in spans]
        for stage in stages:
            stage.load_state_dict({name: state[name] for name in stage.state_dict()})
        loss, crossed = through(stages, batch)
        tokens = len(batch.inputs.tokens_T)
        for border, tensors in zip(borders, crossed, strict=True):
            assert tuple(t.shape for t in tensors) == shapes_at(config, border, tokens, tokens, lambda heads: heads)
            assert all(t.requires_grad for t in tensors)
        loss.backward()
        assert abs(float(loss.detach() / expected.detach()) - 1) < 1e-12
        found: dict[str, Tensor] = {}
        for stage in stages:
            for name, p in stage.named_parameters():
                assert name not in found or (name == TABLE and stage.is_last)
                assert p.grad is not None, name
                found[name] = found[name] + p.grad if name in found else p.grad
        assert found.keys() == gradients.keys()
        for name, grad in found.items():
            wanted = gradients[name]
            assert wanted is not None
            hold("stages, float64", relative_error(grad, wanted), 1e-10, (borders, name))


def test_only_keys_that_are_read_cross() -> None:
    """The last two of four layers read the keys of the first two, one of each type."""
    config = Case("e2b").config
    assert [carried_types(config, border) for border in (1, 2, 3)] == [
        ["sliding_attention"],
        ["sliding_attention", "full_attention"],
        ["full_attention"],
    ]
    assert not any(carried_types(Case("31b").config, border) for border in (1, 2, 3))


def scheduled(variant: str, layout: Layout, name: str, micro_batches: int = 4, **options: Any) -> Case:
    """A sequence for each micro-batch of a rank, so that one micro-batch has nothing supervised."""
    return Case(
        variant,
        layout,
        (("parallel.pp_schedule", name), *options.items()),
        batch_size=micro_batches * layout.dp,
        micro_batch_size=1,
        length=24,
        steps=1,
        seed=1,
    )


PP2, PP4, PP2_DP2, PP2_HSDP = Layout(pp=2), Layout(pp=4), Layout(pp=2, dp_shard=2), Layout(pp=2, dp_replicate=2)
FULL: dict[str, Any] = {"activation_checkpoint.mode": "full"}
SELECTIVE: dict[str, Any] = {"activation_checkpoint.mode": "selective"}
SCHEDULED: dict[int, list[Case]] = {
    2: [
        scheduled("e4b", PP2, "1f1b", micro_batches=5, **FULL),
        scheduled("26b_a4b", PP2, "interleaved", **FULL),
        scheduled("e2b", PP2, "zero_bubble", micro_batches=2),
        scheduled("12b", PP2, "zero_bubble", **SELECTIVE),
    ],
    4: [
        scheduled("e2b", PP4, "1f1b"),  # a border on each side of the last layer whose keys are read
        scheduled("e4b", PP4, "1f1b"),
        scheduled("e4b", PP2_DP2, "interleaved", **FULL),
        scheduled("26b_a4b", PP2_HSDP, "zero_bubble", **{"parallel.reshard_after_forward": False}, **FULL),
    ],
}


@pytest.mark.parametrize("ranks", SCHEDULED)
def test_every_schedule_gives_the_gradients_of_one_process(ranks: int, slow_imports: None) -> None:
    cases = SCHEDULED[ranks]
    for case in cases:
        assert {bool((row.labels_S != IGNORE).any()) for row in sequences(case, 0)} == {True, False}
    expected = [reference(case.reference_key) for case in cases]

    def run(world: World) -> list[Errors]:
        return [train(case, world, whole) for case, whole in zip(cases, expected, strict=True)]

    for case, *everywhere in zip(cases, *run_ranks(ranks, run), strict=True):
        found = worst_of(everywhere)
        report(
            "Pipelines against one process, float64, relative errors",
            {
                "variant": case.variant,
                "pp": case.layout.pp,
                "dp": case.layout.dp,
                "options": ", ".join(f"{name}={value}" for name, value in case.options),
                "micro-batches": case.batch_size // case.layout.dp,
                "loss": f"{found.loss:.1e}",
                "norm": f"{found.norm:.1e}",
                "worst gradient": f"{found.gradient:.1e}",
            },
        )
        found.hold("pipelines", case.dtype, case)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_no_schedule_changes_what_bfloat16_gives(micro_batches: int, slow_imports: None) -> None:
    """Weight gradients made apart are added up in float32 too: errors are those of the plain schedule.

    With as few micro-batches as ranks, all of them are made when no backward is left.
    """
    cases = [scheduled("e2b", PP2, name, micro_batches) for name in SCHEDULES]
    expected = reference(cases[0].reference_key).gradients[0]

    def run(world: World) -> list[dict[str, float]]:
        found = []
        for case in cases:
            mesh, wanted = build_mesh(CPU, PP2), plans(dict(case.options))
            about: dict[str, Any] = {"sequence_length": case.length, "compute_dtype": torch.bfloat16}
            parallel = build_parallel_model(case.config, mesh, CPU, initial_values(case.seed), wanted, **about)
            step(parallel, case, world)
            found.append(gradient_errors(parallel.model, expected))
        return found

    plain, *others = run_ranks(2, run)[0]
    assert 1e-3 < max(plain.values()) < 0.3
    for other in others:
        assert all(abs(other[name] - plain[name]) < 1e-3 for name in plain)


def step(parallel: ParallelModel, case: Case, world: World, number: int = 0) -> Engine:
    """Forward and backward of the case's sequences."""
    engine, supervised = Engine(parallel, CrossEntropy(), CPU), whole_batch(case, number).kept.count
    engine.forward_backward(share_of(case, number, case.layout, world.rank), supervised)
    return engine


def test_copies_of_the_table_stay_equal_while_shapes_change(slow_imports: None) -> None:
    """Steps of other lengths and numbers of micro-batches, and the first again, each with the optimizer behind it."""
    shapes = [(4, 24), (2, 32), (4, 24)]
    cases = [replace(scheduled("e2b", PP2, "1f1b", micro_batches=n), length=length) for n, length in shapes]

    def run(world: World) -> list[bool]:
        mesh, same = build_mesh(CPU, PP2), []
        parallel = build_parallel_model(cases[0].config, mesh, CPU, initial_values(0), sequence_length=24)
        optimizer = build_optimizer(parallel.model, OptimizerConfig(lr=1e-2))
        table = local_part(dict(parallel.model.named_parameters())[TABLE])
        for number, case in enumerate(cases):
            before = table.detach().clone()
            step(parallel, case, world, number).clip(0.5)
            optimizer.step()
            optimizer.zero_grad()
            same.append(torch.equal(table, send_recv(table.detach(), 1 - world.rank, mesh.pp)))
            assert not torch.equal(before, table)
        return same

    assert run_ranks(2, run) == [[True] * len(shapes)] * 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma4_tiny_e4b", {"parallel.pp_schedule": "1f1b", **FULL}),
        # An image's tokens see each other both ways in all stages.
        ("gemma4_tiny_31b", {"parallel.pp_schedule": "zero_bubble"}),
    ],
    ids=["e4b", "31b"],
)
def test_media_of_some_micro_batches_enter_at_the_first_stage(
    name: str, options: dict[str, Any], slow_imports: None
) -> None:
    config = config_of(name)
    data = batches(config, [ROWS[1], ROWS[0], ROWS[2], ROWS[3]])
    supervised = sum(batch.kept.count for batch in data)

    def run(world: World) -> tuple[dict[str, float], set[str]]:
        mesh, fill = build_mesh(CPU, PP2), random_fill(3, 0.1, 0)
        about: dict[str, Any] = {"sequence_length": 48, "compute_dtype": torch.float64}
        parallel = build_parallel_model(config, mesh, CPU, fill, plans(options), **about)
        Engine(parallel, CrossEntropy(), CPU).forward_backward(data, supervised)
        return gradient_errors(parallel.model, expected), {key for key, _ in parallel.model.named_parameters()}

    plain = Gemma4(config).double()
    random_fill(3, 0.1, 0)(whole_slices(plain))
    for batch in data:
        (cross_entropy(plain, batch).total / supervised).backward()
    expected = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    (found, on_first), (_, on_last) = run_ranks(2, run)
    assert max(found.values()) < GRADIENTS_WITHIN[torch.float64]
    assert any("tower" in key for key in on_first) and not any("tower" in key for key in on_last)
