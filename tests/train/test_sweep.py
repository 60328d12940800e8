"""Sweeps: which runs a command line stands for, and how they are made one after the other or in an array."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model import ConfigError
from tests.harness.processes import MAIN, TORCHRUN
from tests.harness.runs import losses, overrides
from train.sweep import is_sweep, jobs, sweep, words_of_task


def test_every_combination_is_a_run_in_a_folder_of_its_own() -> None:
    found = jobs(["-m", "+variant=tiny_e4b,tiny_31b", "optimizer.lr=1e-3,3e-3", "train.steps=3", "run.dir=runs/s"])
    assert [job.folder.name for job in found] == [
        "0_variant_tiny_e4b_lr_0.001",
        "1_variant_tiny_e4b_lr_0.003",
        "2_variant_tiny_31b_lr_0.001",
        "3_variant_tiny_31b_lr_0.003",
    ]
    assert {job.folder.parent for job in found} == {Path("runs/s")}
    assert found[2].choices == ("variant=tiny_31b", "optimizer.lr=0.001")
    assert found[2].words == [
        "+variant=tiny_31b",
        "optimizer.lr=0.001",
        "train.steps=3",
        "run.dir=runs/s",
        "run.dir=runs/s/2_variant_tiny_31b_lr_0.001",
    ]


def test_values_are_listed_as_hydra_lists_them(tmp_path: Path) -> None:
    assert [job.choices for job in jobs(["-m", "train.steps=range(1,4)"])] == [
        ("train.steps=1",),
        ("train.steps=2",),
        ("train.steps=3",),
    ]
    found = jobs(["-m", "optimizer.name=choice(adamw,muon)", "schedule.name=wsd,constant"])
    assert [job.folder.name for job in found][:2] == [
        "0_optimizer.name_adamw_schedule.name_wsd",
        "1_optimizer.name_adamw_schedule.name_constant",
    ]
    assert [job.folder.name for job in jobs(["--multirun", "data.source=/a/b,/c"])] == ["0_source_-a-b", "1_source_-c"]
    (tmp_path / "mine.yaml").write_text("run: {dir: runs/mine}\ndata: {sources: [{path: a}, {path: 'b,c'}]}\n")
    (one,) = jobs(["-m", "--config", str(tmp_path / "mine.yaml"), "run.seed=3"])
    assert (one.choices, one.folder) == ((), Path("runs/mine/0"))
    assert is_sweep(["a", "--multirun"]) and not is_sweep(["run.dir=-m"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lr=1e-3,abc"], "optimizer.lr=abc has the wrong type"),
        (["+variant=tiny_e4b,tiny_e4q"], "variant=tiny_e4q does not exist; nearest: tiny_e4b"),
        (["optimizer.lr=interval(0,1)"], "has no end of values; list them, as in KEY=1,2"),
        (["run.dir=a,b"], "run.dir is one folder, in which each run of a sweep gets its own"),
        (["data.source=a[b,c"], "is not KEY=VALUE or .*quote values with special characters"),
        (["train.stepz=3"], "train.stepz is no config key; nearest: train.steps"),
    ],
)
def test_a_mistake_in_any_run_starts_none(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        jobs(["-m", *words])
    assert "\n" not in str(caught.value)


def table(said: str, lines: int) -> list[list[str]]:
    return [line.split() for line in said.splitlines()[-lines:]]


def test_a_finished_run_is_not_made_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, folder = ["-m", *overrides(tmp_path, "train.steps=1")], tmp_path / "run" / "0"
    for said in (f"done: step 1, 384 tokens, run folder {folder}", f"done: already at step 1 of 1 in {folder}"):
        assert sweep(words, [sys.executable, MAIN]) == 0
        out = capfd.readouterr().out
        assert f"run 1 of 1: nothing is listed | run folder {folder}\n" in out and said in out
        (loss,) = losses(folder)
        assert table(out, 2) == [
            ["in", str(tmp_path / "run"), "choices", "exit", "last", "loss"],
            ["0", "0", f"{loss:.4f}"],
        ]


@pytest.mark.parametrize(
    ("does", "status", "ends"),
    [
        ("pass", 0, ["0", "0", "0"]),
        ("sys.exit(3 * ('train.steps=1' in sys.argv))", 1, ["3", "0", "0"]),
        ("os.kill(os.getpid(), 9)", 1, ["SIGKILL", "SIGKILL", "SIGKILL"]),
        ("signal.signal(15, lambda *_: sys.exit(0)); os.kill(os.getppid(), 15); time.sleep(60)", 143, ["0"]),
        ("os.kill(os.getppid(), 2)", 130, ["0"]),
    ],
)
def test_how_runs_end(does: str, status: int, ends: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The launcher of these runs does one thing, with the run's words behind it."""
    before = signal.getsignal(signal.SIGTERM)
    launcher = [sys.executable, "-c", f"import os, signal, sys, time; {does}"]
    assert sweep(["-m", "train.steps=1,2,3", "run.dir=/nowhere/s"], launcher) == status
    found = table(capfd.readouterr().out, 3)
    expected = [*ends, *["not started"] * (3 - len(ends))]
    assert [" ".join(row[2:-1]) for row in found] == expected
    assert [row[-1] for row in found] == ["none"] * 3 and signal.getsignal(signal.SIGTERM) is before


def test_an_array_s_task_is_one_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", "optimizer.lr=1e-3,3e-3", "run.dir=runs/s"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert words_of_task(words) == ["optimizer.lr=0.003", "run.dir=runs/s", "run.dir=runs/s/1_lr_0.003"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(ConfigError, match=r"SLURM_ARRAY_TASK_ID=2, but the sweep has 2 runs; submit --array=0-1\."):
        words_of_task(words)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = [TORCHRUN, "--nproc", "1", MAIN, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("error: -m under torchrun would have every rank sweep for itself; let each run start") == 1
