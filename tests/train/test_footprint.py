"""The memory of a rank: what is counted beside what a step takes, and whether recipes fit."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data.batch import Batch
from launch import memory
from launch.benchmarks.scaling import peak
from model import Gemma4Config
from model.init import random_fill
from parallel.apply import build_parallel_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.options import ActivationCheckpointConfig, PlanConfig
from parallel.world import World
from tests.harness.compare import hold
from tests.harness.distributed import run_ranks
from tests.harness.report import report
from train.engine import Engine
from train.footprint import GB, Step, Tracker, capacity, footprint, footprint_of
from train.load_config import load_config
from train.objective import CrossEntropy
from train.resolve import resolve
from train.screen import show_memory

CPU = torch.device("cpu")
README = Path(__file__).resolve().parents[2] / "README.md"


@dataclass(frozen=True)
class Case:
    variant: str
    dtype: torch.dtype
    mode: str = "full"
    vocabulary: int = 8192
    hidden: int = 384
    length: int = 1024

    @property
    def config(self) -> Gemma4Config:
        sizes = {"hidden_size": self.hidden, "intermediate_size": 4 * self.hidden, "vocab_size": self.vocabulary}
        sizes |= {"num_hidden_layers": 6} if self.mode == "none" else {}
        return Gemma4Config.from_name(f"tiny_{self.variant}", vision=None, audio=None, **sizes)

    @property
    def plans(self) -> PlanConfig:
        return PlanConfig(activation_checkpoint=ActivationCheckpointConfig(mode=self.mode))


CASES = {
    1: [
        Case("31b", torch.float32, "none"),
        Case("12b", torch.bfloat16, "none", hidden=128, length=512),
        Case("12b", torch.bfloat16, "full", 32_768, hidden=64, length=256),
        Case("e4b", torch.float32),
    ],
    2: [
        Case("31b", torch.float32, hidden=256, length=512),
        Case("26b_a4b", torch.bfloat16, hidden=64, length=256, vocabulary=4096),
    ],
}
"""Cases for each number of ranks. With two, a layer's gradients may be on their way: only many layers will do.

What is in bfloat16 is small, since many processors take fifty times as long for it.
"""


def measured(case: Case, ranks: int) -> int:
    """What a step adds where gradients are there already."""
    mesh = build_mesh(CPU, Layout(dp_shard=ranks))
    fill = random_fill(0, 0.02, 0)
    parallel = build_parallel_model(case.config, mesh, CPU, fill, case.plans, compute_dtype=case.dtype)
    engine = Engine(parallel, CrossEntropy(), CPU, "every")
    tokens = torch.randint(3, 500, (1, case.length), generator=torch.Generator().manual_seed(0))
    batch = Batch.make(case.config, tokens, tokens, torch.arange(case.length)[None], torch.zeros_like(tokens))
    engine.forward_backward([batch], case.length)
    # The least of some: a peer that comes late leaves more of what is exchanged under way.
    return min(peak(lambda: engine.forward_backward([batch], case.length)) for _ in range(2 * ranks - 1))


@pytest.mark.parametrize("ranks", CASES)
def test_what_is_counted_is_what_a_step_takes(ranks: int) -> None:
    import torchtitan.distributed.activation_checkpoint  # noqa: F401  once here, not in every rank

    def on_rank(world: World) -> list[int]:
        return [measured(case, world.size) for case in CASES[ranks]]

    for case, *found in zip(CASES[ranks], *run_ranks(ranks, on_rank), strict=True):
        step = Step(1, case.length, 1, case.dtype, "cpu", "every")
        counted = footprint(case.config, Layout(dp_shard=ranks), case.plans, step)
        held = sum(counted.held.values())
        total = held + min(found)
        error = abs(counted.peak / total - 1)
        report(
            "Memory of a rank, MB",
            {
                "variant": case.variant,
                "ranks": ranks,
                "dtype": str(case.dtype).removeprefix("torch."),
                "recomputed": case.mode,
                "measured": f"{total / 1e6:.0f}",
                "counted": f"{counted.peak / 1e6:.0f}",
                "most in the": counted.narrowest,
            },
        )
        hold("memory of a rank, counted beside measured", error, 0.05, case)


def test_a_tracker_counts_what_is_alive() -> None:
    before = torch.empty(1000, device="meta")
    with Tracker() as tracker:
        doubled = before + before
        assert (tracker.now, tracker.peak) == (4000, 4000)
        view = doubled[:10]
        assert tracker.now == 4000, "a view adds nothing"
        del doubled
        assert tracker.now == 4000, "and keeps what it looks at"
        del view
        assert (tracker.now, tracker.peak) == (0, 4000)
        del before
        assert tracker.now == 0, "what was there before is not counted"


@pytest.mark.parametrize("variant", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_a_released_recipe_fits_eight_cards_of_80_gb(variant: str) -> None:
    run = resolve(load_config([f"+variant={variant}"]), 8)
    found = footprint_of(run, torch.bfloat16, "cuda")
    weights = {"e2b": 4.63, "e4b": 7.46, "12b": 11.9, "26b_a4b": 25.2, "31b": 30.7}[variant] * GB
    assert sum(found.held.values()) == pytest.approx(16 * weights / 8, rel=0.01)
    assert found.peak < capacity(80 * 2**30)
    row = next(line for line in README.read_text().splitlines() if line.startswith(f"| `{variant}` | "))
    assert row.split(" | ")[1:4] == [str(run.layout), f"{found.peak / GB:.1f}", found.narrowest]


def test_more_of_what_saves_memory_takes_less() -> None:
    def taken(*words: str) -> int:
        return footprint_of(resolve(load_config(["+variant=31b", *words]), 8), torch.bfloat16, "cuda").peak

    plain = taken("parallel.tp=1")
    assert plain > capacity(80 * 2**30), "why the recipe has tp=2"
    for words in (
        ("parallel.tp=4",),
        ("parallel.tp=1", "parallel.cp=2"),
        ("parallel.tp=1", "data.sequence_length=4096"),
        ("parallel.tp=1", "optimizer.name=muon"),
        ("parallel.tp=1", "parallel.cpu_offload=true"),
    ):
        assert taken(*words) < 0.97 * plain, words
    for words in (
        ("parallel.tp=1", "activation_checkpoint.mode=none"),
        ("parallel.tp=1", "activation_checkpoint.every=2"),
        ("parallel.tp=1", "parallel.gradient_sync=last"),
        ("parallel.tp=1", "train.micro_batch_size=2"),
    ):
        assert taken(*words) > 1.03 * plain, words


def test_the_command_and_the_log_say_what_does_not_fit(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory", "8", "+variant=31b", "parallel.tp=1"])
    memory.main()
    said = capsys.readouterr().out
    assert "held throughout: weights 15.3 | gradients 15.3 | optimizer 30.7" in said
    assert "does not fit a card of 80 GB, of whose 85.9 tensors may take 77.4" in said
    assert "it fits 16 ranks (dp_shard 16)" in said
    for words, message in (
        (["x"], "x is no number of ranks; it goes first"),
        (["8", "+variant=e9b"], "variant=e9b does not exist; nearest: "),
        (["gb=many", "8"], "gb= takes a number"),
    ):
        monkeypatch.setattr(sys, "argv", ["memory", *words])
        with pytest.raises(SystemExit, match=message):
            memory.main()
    with caplog.at_level(logging.INFO, "gemwright"):
        show_memory(resolve(load_config(["+variant=31b"]), 8), torch.bfloat16, 80 * 2**30)
        assert (
            "memory a rank: 61.4 GB of weights, gradients and optimizer state, with a step 71.5 of 77.4" in caplog.text
        )
        assert "may not suffice" not in caplog.text
        show_memory(resolve(load_config(["+variant=31b"]), 8), torch.bfloat16, 40 * 2**30)
        assert "memory may not suffice: try parallel.tp" in caplog.text
