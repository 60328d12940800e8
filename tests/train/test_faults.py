"""Faults of processes and folders: each ends in seconds, with one line, and nothing is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.processes import MAIN, alive, children, start, wait_for_steps, wait_until, workers
from tests.harness.runs import losses, overrides, train_on

LONG = ("train.steps=2000", "checkpoint.every=0")


@pytest.fixture(autouse=True)
def _nothing_stays_behind(tmp_path: Path) -> Iterator[None]:
    """What a failed test left running is killed: all that has its folder in the command line."""
    yield
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(tmp_path).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "LATEST").read_text().removeprefix("step_"))


def test_a_launcher_that_is_killed_takes_no_step_along(tmp_path: Path) -> None:
    process = start(overrides(tmp_path, *LONG))
    wait_for_steps(tmp_path / "run", 3, process)
    ranks = workers(process)
    process.kill()
    out, _ = process.communicate(timeout=60)
    assert wait_until(lambda: not any(map(alive, ranks)), 30), "ranks end by themselves"
    step = saved_step(tmp_path / "run")
    assert step >= 3 and len(losses(tmp_path / "run")) == step, out
    train_on(2, overrides(tmp_path, f"train.steps={step + 1}"))
    assert len(losses(tmp_path / "run")) == step + 1


def test_usr1_to_the_launcher_saves_and_ends(tmp_path: Path) -> None:
    process = start(overrides(tmp_path, *LONG))
    wait_for_steps(tmp_path / "run", 3, process)
    os.kill(process.pid, signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert f"stopped as asked at step {saved_step(tmp_path / 'run')}" in out and "Traceback" not in out, out


def test_a_busy_folder_is_one_line_at_once_and_free_when_its_rank_is_killed(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, *LONG, "checkpoint.every=2", "data.workers=1")
    process = start(arguments)
    wait_for_steps(tmp_path / "run", 5, process)
    ranks = workers(process)
    began = time.monotonic()
    second = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--nproc", "2", MAIN, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert time.monotonic() - began < 60
    owner = re.escape(f"(process {ranks[0]} on {os.uname().nodename})")
    (line,) = [line for line in second.stderr.splitlines() if "error" in line]
    assert re.fullmatch(
        rf"error( \(rank 1\))?: another job trains in run\.dir=.* {owner}; stop it first, or choose .*", line
    ), line
    assert second.returncode == 1 and "killed" not in second.stderr

    loaders = children(ranks[0])
    assert loaders
    os.kill(ranks[0], signal.SIGKILL)
    process.kill()
    process.communicate(timeout=60)
    train_on(1, overrides(tmp_path, f"train.steps={saved_step(tmp_path / 'run') + 1}"))
    assert wait_until(lambda: not any(map(alive, [*loaders, ranks[1]])), 30), "workers and ranks end by themselves"


def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    process = start(overrides(tmp_path, *LONG, "run.silence_seconds=4"))
    said: list[str] = []
    wait_for_steps(tmp_path / "run", 3, process)
    ranks = workers(process)
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()

    def heard(words: str) -> bool:
        return any(words in line for line in list(said))

    os.kill(ranks[1], signal.SIGSTOP)
    assert wait_until(lambda: heard(f"rank 1 (process {ranks[1]} on "), 30), said[-4:]
    os.kill(ranks[1], signal.SIGCONT)
    assert wait_until(lambda: heard("rank 1 answers again"), 30), said[-4:]
    os.kill(ranks[1], signal.SIGSTOP)
    process.terminate()
    assert wait_until(lambda: heard("told to stop, but rank 1 does not answer, so nothing more"), 30), said[-4:]
    for pid in [*ranks, process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_killed_loader_worker_is_one_line(tmp_path: Path) -> None:
    process = start(overrides(tmp_path, *LONG, "data.workers=1"), ranks=1)
    wait_for_steps(tmp_path / "run", 3, process)
    (rank,) = workers(process)
    (worker,) = children(rank)
    os.kill(worker, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert "error: a loader worker was killed (" in out and "Traceback" not in out, out
