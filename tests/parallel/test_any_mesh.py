"""A checkpoint of any mesh goes on, on any other, with the loss it would have had."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from parallel.apply import build_parallel_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.world import World
from tests.harness.compare import hold
from tests.harness.distributed import run_ranks
from tests.harness.meshes import CPU, Case, initial_values, share_of, whole_batch
from tests.harness.report import report
from train.checkpoint import Checkpointer
from train.engine import Engine
from train.objective import CrossEntropy
from train.optimizer import build_optimizer

MESHES = {
    "26b_a4b": {
        "1 rank": Layout(),
        "dp2": Layout(dp_shard=2),
        "hsdp 2x2·ep2": Layout(dp_replicate=2, dp_shard=2, ep=2),
        "tp2+sp·ep2": Layout(tp=2, ep=2),
        "dp2·cp2·ep4": Layout(dp_shard=2, cp=2, ep=4),
        "pp2·tp2": Layout(pp=2, tp=2, sequence_parallel=False),
    },
    "e2b": {
        "dp2": Layout(dp_shard=2),
        "tp4+sp": Layout(tp=4),
        "pp2·cp2": Layout(pp=2, cp=2),
        "hsdp 2x2": Layout(dp_replicate=2, dp_shard=2),
    },
}


class Running:
    """A case on this rank's mesh, one step at a time."""

    def __init__(self, variant: str, layout: Layout, world: World, seed: int) -> None:
        self.case, self.rank = Case(variant, layout, seed=seed), world.rank
        mesh = build_mesh(CPU, layout)
        about: dict[str, Any] = {"sequence_length": self.case.length, "compute_dtype": self.case.dtype}
        self.parallel = build_parallel_model(self.case.config, mesh, CPU, initial_values(seed), **about)
        self.optimizer = build_optimizer(self.parallel.model, self.case.optimizer_config)
        self.engine = Engine(self.parallel, CrossEntropy(), CPU)

    def step(self, number: int) -> float:
        supervised = whole_batch(self.case, number).kept.count
        sums = self.engine.forward_backward(share_of(self.case, number, self.case.layout, self.rank), supervised)
        assert sums is not None
        total = sums["loss"].double()
        dist.all_reduce(total)
        self.engine.clip(0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total) / supervised


@pytest.mark.matrix
@pytest.mark.parametrize("variant", MESHES)
def test_any_mesh_loads_what_any_mesh_saved(variant: str, tmp_path: Path) -> None:
    """Two steps, save, two more, of which the second needs the optimizer's state too."""
    meshes = MESHES[variant]

    def save(name: str) -> Any:
        def on_rank(world: World) -> list[float]:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            running = Running(variant, meshes[name], world, seed=0)
            losses = [running.step(0), running.step(1)]
            Checkpointer(folder, keep=1, asynchronous=False).save(2, running.parallel.model, running.optimizer, {})
            return [*losses, running.step(2), running.step(3)]

        return run_ranks(meshes[name].world_size, on_rank)[0]

    def load(name: str) -> Any:
        def on_rank(world: World) -> dict[str, list[float]]:
            running, found = Running(variant, meshes[name], world, seed=7), {}
            for other in meshes:
                if other != name:
                    folder = tmp_path / other
                    checkpoints = Checkpointer(folder, keep=1, asynchronous=False, writing=False)
                    checkpoints.load(folder / "step_00000002", running.parallel.model, running.optimizer)
                    running.case = Case(variant, meshes[name], seed=0)
                    found[other] = [running.step(2), running.step(3)]
            return found

        return run_ranks(meshes[name].world_size, on_rank)[0]

    saved = {name: save(name) for name in meshes}
    for one, other in pairwise(saved.values()):
        assert max(abs(a / b - 1) for a, b in zip(one, other, strict=True)) < 1e-10
    for name in meshes:
        for other, losses in load(name).items():
            errors = [abs(a / b - 1) for a, b in zip(losses, saved[other][2:], strict=True)]
            report(
                "A checkpoint of one mesh on another, relative difference of the next two losses",
                {"variant": variant, "saved on": other, "loaded on": name}
                | {"next": f"{errors[0]:.1e}", "after": f"{errors[1]:.1e}"},
            )
            hold("checkpoints on other meshes, float64", max(errors), 1e-10, (other, name))
