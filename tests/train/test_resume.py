"""A run killed at any instant goes on as if nothing had happened, also on another number of ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.batch import Batch
from model.head import Head
from parallel.world import World
from tests.harness.compare import hold
from tests.harness.distributed import run_ranks
from tests.harness.processes import start, wait_for_steps, workers
from tests.harness.report import report
from tests.harness.runs import losses, overrides, records, train_on
from train.load_config import load_config
from train.objective import CrossEntropy, Loss
from train.resolve import resolve
from train.trainer import Trainer

STEPS = [
    "train.steps=14",
    "checkpoint.every=4",
    "train.sample_every=7",
    "train.sample_tokens=4",
    "run.deterministic=true",
    "run.dtype=float64",  # other numbers of ranks add in other orders
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-rank run killed with SIGKILL after step 9, and beside it the run nobody killed."""
    folder = tmp_path_factory.mktemp("killed")
    torch.save(train_on(2, overrides(folder, *STEPS, run="whole")), folder / "parameters.pt")
    process = start(overrides(folder, *STEPS, run="killed"))
    wait_for_steps(folder / "killed", 9, process)
    for worker in workers(process):  # the launcher puts each in a session of its own
        os.kill(worker, signal.SIGKILL)
    process.kill()
    process.wait()
    assert len(losses(folder / "killed")) < 14
    return folder


@pytest.mark.parametrize("ranks", [2, 1, 4])
def test_a_killed_run_goes_on(killed: Path, ranks: int) -> None:
    run = f"resumed-{ranks}"
    shutil.copytree(killed / "killed", killed / run)
    resumed_at = int((killed / run / "checkpoints" / "LATEST").read_text().removeprefix("step_"))
    assert resumed_at in (4, 8, 12)
    parameters = train_on(ranks, overrides(killed, *STEPS, run=run))
    expected, found = losses(killed / "whole"), losses(killed / run)
    assert [r["step"] for r in records(killed / run)] == list(range(1, 15))
    assert (killed / run / "samples.jsonl").read_text().count("\n") == 6
    error = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    report(
        "Killed with SIGKILL and resumed, against a run nobody killed",
        {"ranks": f"2, then {ranks}", "resumed at": resumed_at, "of": 14, "max rel. dloss": f"{error:.1e}"},
    )
    if ranks == 2:
        assert found == expected, "the same layout goes on bit for bit"
        whole = torch.load(killed / "parameters.pt")
        assert all(torch.equal(parameters[name], whole[name]) for name in whole)
    hold("killed and resumed on other ranks, float64: loss", error, 1e-10)


def test_a_mixture_goes_on_on_another_mesh(tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    (more / "zoo.jsonl").write_text("".join(json.dumps({"text": "zebra quagga " * n}) + "\n" for n in range(1, 30)))
    one = overrides(tmp_path, "train.steps=8", "checkpoint.every=4", "run.dtype=float64", run="whole")
    mixed = [text for text in one if not text.startswith("data.source=")]
    mixed.append(f"data.sources=[{{path: {tmp_path / 'corpus.jsonl'}, weight: 3}}, {{path: {more}}}]")
    train_on(1, mixed)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000008")
    train_on(2, [*mixed, f"run.dir={tmp_path / 'resumed'}", "data.workers=1", "train.micro_batch_size=2"])
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    state = json.loads((tmp_path / "resumed" / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert state["sequences_seen"] == 64 and re.fullmatch(r"3 x \w{20} \+ 1 x \w{20}", state["data"]["corpus"])
    error = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    hold("killed and resumed on other ranks, float64: loss", error, 1e-10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_on_all_and_ends_well(tmp_path: Path, number: signal.Signals) -> None:
    arguments = overrides(tmp_path, "train.steps=2000", "checkpoint.every=0")
    process = start(arguments)
    wait_for_steps(tmp_path / "run", 3, process)
    os.kill(workers(process)[1], number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    step = int((tmp_path / "run" / "checkpoints" / "LATEST").read_text().removeprefix("step_"))
    assert 3 <= step < 2000
    assert f"stopped as asked at step {step}" in out
    assert len(losses(tmp_path / "run")) == step


def test_a_signal_to_the_launcher_saves_although_it_reaches_data_workers_too(tmp_path: Path) -> None:
    process = start(overrides(tmp_path, "train.steps=2000", "checkpoint.every=0", "data.workers=2"))
    wait_for_steps(tmp_path / "run", 3, process)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert "Traceback" not in out, out
    step = int((tmp_path / "run" / "checkpoints" / "LATEST").read_text().removeprefix("step_"))
    assert 3 <= step < 2000 and len(losses(tmp_path / "run")) == step


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_stop_before_a_step_is_done_leaves_the_step_before(tmp_path: Path, accumulation: int) -> None:
    arguments = overrides(tmp_path, f"train.micro_batch_size={8 // accumulation}")

    def stop_in_step(world: World, at: int) -> int:
        trainer = Trainer(resolve(load_config(arguments), world.size), world, torch.device("cpu"))
        calls: list[int] = []

        class Counted(CrossEntropy):
            def __call__(self, hidden_TD: Tensor, head: Head, weight_VD: Tensor, batch: Batch) -> Loss:
                calls.append(1)
                if len(calls) == at:
                    trainer.stop.signal_name = "SIGTERM"
                return super().__call__(hidden_TD, head, weight_VD, batch)

        trainer.engine.objective = Counted()
        if at == 0:
            trainer.stop.signal_name = "SIGTERM"
        trainer.train()
        return trainer.progress.step

    assert run_ranks(1, lambda world: stop_in_step(world, 0)) == [0]
    during = 2 * accumulation + 1  # the first micro-batch of step 3
    assert run_ranks(1, lambda world: stop_in_step(world, during)) == [3 if accumulation == 1 else 2]
    train_on(1, arguments)
    assert len(losses(tmp_path / "run")) == 5


def test_a_killed_rank_is_named_in_one_line(tmp_path: Path) -> None:
    process = start(overrides(tmp_path, "train.steps=2000", "checkpoint.every=2"))
    wait_for_steps(tmp_path / "run", 3, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: rank 1 was killed by SIGKILL" in out
    assert "Traceback" not in out, out
    assert (tmp_path / "run" / "checkpoints" / "LATEST").exists()
