"""Muon: orthogonal updates, the same on every mesh, and what they are worth."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from model import Gemma4, Gemma4Config
from parallel.layout import Layout
from tests.harness.compare import hold, relative_error
from tests.harness.meshes import Case, Errors, run_all
from tests.harness.report import report
from tests.harness.runs import losses, overrides, train_on
from train.config import OptimizerConfig
from train.muon import Matrix, Muon, _matrices, is_orthogonalised, orthogonal
from train.optimizer import ShardedOptimizer, build_optimizer


@pytest.mark.parametrize("shape", [(1, 48, 48), (1, 16, 64), (1, 64, 16), (3, 24, 40)])
def test_singular_values_come_to_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.1, s.shape[-1], dtype=torch.float64).expand_as(s)
    found = orthogonal(u * s[..., None, :] @ vh)
    inner = u.mT @ found @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-9)


def test_a_step_is_that_of_torch() -> None:
    """torch's own computes in bfloat16."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(40, 24))
    theirs = torch.nn.Parameter(ours.detach().clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    config = OptimizerConfig("muon", lr=0.02)
    muon = Muon([ours], ["w"], config, None)
    optimizer = ShardedOptimizer([{"params": [ours], "weight_decay": 0.1, "muon": muon}], config)
    for _ in range(4):
        ours.grad = torch.randn(40, 24)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        reference.step()
        optimizer.step()
        with torch.no_grad():
            our_step, their_step = ours - before, theirs - before
            assert relative_error(our_step, their_step) < 0.02
            theirs.copy_(ours)


def test_matrices_of_layers_are_taken_and_packed_ones_apart() -> None:
    config = Gemma4Config.from_name("tiny_26b_a4b")
    with torch.device("meta"):
        parameters = dict(Gemma4(config).named_parameters())
    taken = {name for name, parameter in parameters.items() if is_orthogonalised(name, parameter)}
    first = {name.partition(".layers.0.")[2] for name in taken if name.startswith("language_model.layers.0.")}
    attention = {f"self_attn.{side}_proj.weight" for side in "qkvo"}
    mlp = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert first == attention | mlp | {"experts.gate_up_proj", "experts.down_proj"}
    assert all(".layers." in name for name in taken)
    name = "language_model.layers.0.experts.gate_up_proj"
    experts, rows, columns = parameters[name].shape
    boxes = [*_matrices(name, parameters[name].shape)]
    assert len(boxes) == 2 * experts and len(set(boxes)) == len(boxes)
    assert {Matrix(0, box).shape for box in boxes} == {(rows // 2, columns)}
    optimizer = build_optimizer(Gemma4(config), OptimizerConfig("muon"))
    assert sorted(len(state) for state in optimizer.state.values())[0] == 1  # one number an element, not two


MESHES = {
    "dp_shard 2": Case("e4b", Layout(dp_shard=2)),
    "pp 2": Case("31b", Layout(pp=2)),
    "ep 2": Case("26b_a4b", Layout(dp_shard=2, ep=2)),
    "tp 4": Case("12b", Layout(tp=4)),
    "cp 2 x tp 2": Case("31b", Layout(cp=2, tp=2)),
    "hsdp 2 x 2": Case("e2b", Layout(dp_replicate=2, dp_shard=2)),
    "dp_shard 2 x tp 2 x ep 4": Case("26b_a4b", Layout(dp_shard=2, tp=2, ep=4)),
    "offloaded": Case("e2b", Layout(dp_shard=2, tp=2), (("parallel.cpu_offload", True),)),
}


@cache
def on_ranks(ranks: int) -> dict[str, Errors]:
    named = {
        name: Case(case.variant, case.layout, case.options, optimizer="muon", steps=4)
        for name, case in MESHES.items()
        if case.layout.world_size == ranks
    }
    return dict(zip(named, run_all(list(named.values())), strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_moves_no_number(mesh: str) -> None:
    case = MESHES[mesh]
    found = on_ranks(case.layout.world_size)[mesh]
    found.hold("Muon on meshes against one process", case.dtype, mesh, case.variant)


def test_a_run_goes_on_on_other_ranks_and_with_no_other_optimizer(tmp_path: Path) -> None:
    first = overrides(tmp_path, "train.steps=6", "checkpoint.every=3", "run.dtype=float64", "optimizer.name=muon")
    train_on(2, first)
    run = tmp_path / "run"
    expected = losses(run)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    train_on(1, first)
    error = max(abs(a - b) / b for a, b in zip(losses(run), expected, strict=True))
    hold("Muon resumed on other ranks, float64: loss", error, 1e-10)
    with pytest.raises(AssertionError, match=r"has the state of optimizer\.name=muon, this run is by adamw; use that"):
        train_on(1, [*first, "optimizer.name=adamw", "train.steps=8"])


def test_the_loss_falls_faster_than_by_adamw(tmp_path: Path) -> None:
    """At a rate that is near the best of both, from the start of the reference."""
    found = {}
    for name in ("adamw", "muon"):
        changed = ("train.steps=40", "model.init=reference", "optimizer.lr=2e-2")
        given = overrides(tmp_path, *changed, f"optimizer.name={name}", run=name)
        train_on(1, given)
        found[name] = [sum(losses(tmp_path / name)[end - 5 : end]) / 5 for end in (10, 20, 40)]
        steps = {f"to step {end}": f"{loss:.3f}" for end, loss in zip((10, 20, 40), found[name], strict=True)}
        report("Mean loss of five steps of a tiny run", {"optimizer": name, **steps})
    assert all(ours < theirs - 0.02 for ours, theirs in zip(found["muon"], found["adamw"], strict=True))
