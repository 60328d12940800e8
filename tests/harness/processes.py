"""Runs as users start them, in processes of their own, to be signalled, stopped and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
MAIN = str(ROOT / "train" / "main.py")


def start(arguments: list[str], ranks: int = 2, **environment: str) -> subprocess.Popen[str]:
    """A run by torchrun, whose words of both kinds come from one pipe."""
    return subprocess.Popen(
        [TORCHRUN, "--nproc", str(ranks), MAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"

    def reached() -> bool:
        return metrics.exists() and len(metrics.read_text().splitlines()) >= steps

    if not wait_until(lambda: reached() or process.poll() is not None, 120) or not reached():
        raise AssertionError(f"no step {steps}: {process.communicate()}")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in order."""
    return children(process.pid)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
