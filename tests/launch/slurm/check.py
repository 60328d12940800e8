"""What launch/slurm/train.sbatch promises, on a SLURM that runs already. run.sh starts one and calls this.

    python tests/launch/slurm/check.py FOLDER      # from the checkout; logs and run folders go to FOLDER

A job that meets its time limit saves, requeues itself and goes on as if nothing had happened; one
with a mistake in its command line fails and stays failed.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BIN = ROOT / ".venv" / "bin"
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
CONFIG = [
    "+variant=tiny_e4b",
    "run.device=cpu",
    "data.sequence_length=64",
    "train.global_batch_size=8",
    "train.sample_every=0",
    "checkpoint.every=0",
]
# slurmctld looks at limits every 30 s and warns at the last look before the time asked for, so a
# limit of 2 minutes with a warning at 60 s is a signal between 30 s and 60 s after the start.
LIMIT = ["--time=2", "--signal=B:USR1@60"]
LIMIT_SHOWN = "00:02:00"
TRAINING_SECONDS = 70
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}


class Failure(Exception):
    """A promise that was not kept."""


def require(kept: bool, promise: str) -> None:
    if not kept:
        raise Failure(promise)


def torchrun(folder: Path, steps: int) -> list[dict[str, float]]:
    """Train on four processes of this host, without SLURM; its metrics, one record a step."""
    command = [str(BIN / "torchrun"), "--nproc", "4", "train/main.py", *CONFIG, f"train.steps={steps}"]
    command.append(f"run.dir={folder}")
    log = folder.with_suffix(".out")
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=300)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    require(code == 0, f"torchrun ends with exit code 0, not {code}\n{log.read_text()[-2000:]}")
    return metrics(folder)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def submit(folder: Path, *options: str, home: Path | None = None, arguments: list[str]) -> tuple[str, Path]:
    """Job id and log of a two-node job. Without `home` it is submitted from the checkout."""
    environment = {**os.environ, "GEMWRIGHT_HOME": str(home)} if home else dict(os.environ)
    command = ["sbatch", "--parsable", "-N", "2", "-o", str(folder / "%x-%j.out"), *options, str(SCRIPT), *arguments]
    done = subprocess.run(
        command, cwd=folder if home else ROOT, env=environment, check=True, capture_output=True, text=True
    )
    job = done.stdout.strip()
    return job, folder / f"gemwright-{job}.out"


def state_of(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], check=True, capture_output=True, text=True).stdout
    return dict(field.split("=", 1) for field in shown.split() if "=" in field)


def wait_for_end(job: str, log: Path, timeout: float) -> dict[str, str]:
    """The job as SLURM shows it once it has ended for good."""
    started = time.monotonic()
    while (state := state_of(job))["JobState"] not in FINAL_STATES:
        if time.monotonic() - started > timeout:
            subprocess.run(["scancel", job], check=False)
            raise Failure(f"job {job} ends within {timeout:.0f} s; it was {state['JobState']}\n{tail(log)}")
        if state["JobState"] == "PENDING" and state["Restarts"] == "1" and state["TimeLimit"] == LIMIT_SHOWN:
            # A limit counts anew from each start; the second is to reach the end.
            subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=10"], check=True)
        time.sleep(1)
    return state


def tail(log: Path) -> str:
    return log.read_text()[-2000:] if log.exists() else f"no log {log}"


def interrupted_job(folder: Path, steps: int) -> tuple[Path, int, int]:
    """Run folder, steps and signalled step of a job that met its time limit and came back."""
    for attempt in range(3):
        run = folder / f"interrupted{attempt}"
        job, log = submit(folder, *LIMIT, arguments=[*CONFIG, f"train.steps={steps}", f"run.dir={run}"])
        state = wait_for_end(job, log, timeout=300)
        text = log.read_text()
        if state["JobState"] == "COMPLETED" and "stopped as asked" not in text:
            print(f"job {job}: {steps} steps were over before the signal; again with more", flush=True)
            steps *= 3
            continue
        break
    stopped = [int(step) for step in re.findall(r"^stopped as asked at step (\d+)", text, re.MULTILINE)]
    resumed = [int(step) for step in re.findall(r"^resumed from .* at step (\d+)", text, re.MULTILINE)]
    require(state["JobState"] == "COMPLETED", f"the job ends COMPLETED, not {state['JobState']}\n{tail(log)}")
    require(state["Restarts"] == "1", f"the job is requeued once, not {state['Restarts']} times\n{tail(log)}")
    require(len(stopped) == 1, f"the run stops once, not at {stopped}\n{tail(log)}")
    require(0 < stopped[0] < steps, f"the signal comes in mid-training, not at step {stopped[0]} of {steps}")
    require(resumed == stopped, f"the run goes on at step {stopped}, not {resumed}")
    require(text.count(f"\ndone: step {steps},") == 1, f"the run ends at step {steps}\n{tail(log)}")
    require("4 cpu ranks" in text, "two nodes with two GPUs each give four ranks")
    for step in (stopped[0], steps):
        require((run / "checkpoints" / f"step_{step:08d}").is_dir(), f"there is a checkpoint of step {step}")
    return run, steps, stopped[0]


def same_as_uninterrupted(folder: Path, interrupted: Path, steps: int, signalled: int) -> None:
    """Every step of both runs has the same numbers."""
    once, twice = torchrun(folder / "uninterrupted", steps), metrics(interrupted)
    for records in (once, twice):
        require([record["step"] for record in records] == list(range(1, steps + 1)), "every step is there once")
    difference = {
        key: max(abs(a[key] - b[key]) for a, b in zip(once, twice, strict=True))
        for key in ("loss", "grad_norm", "lr", "tokens_seen")
    }
    print("step signalled  restarts  steps compared  max |dloss|  max |dgrad_norm|  max |dlr|")
    print(
        f"{f'{signalled} of {steps}':<14}  {1:<8}  {steps:<14}  {difference['loss']:<11g}  "
        f"{difference['grad_norm']:<16g}  {difference['lr']:g}",
        flush=True,
    )
    for key, value in difference.items():
        require(value == 0.0, f"{key} is bit for bit the same; it differs by up to {value}")


def mistyped_job(folder: Path) -> None:
    """A mistake in the command line is said once, and SLURM is told that the job failed."""
    job, log = submit(folder, home=ROOT, arguments=[*CONFIG, "train.stepz=3"])
    state = wait_for_end(job, log, timeout=90)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error")]
    require(state["JobState"] == "FAILED", f"the job ends FAILED, not {state['JobState']}\n{tail(log)}")
    require(state["Restarts"] == "0", f"the job is not requeued, it was {state['Restarts']} times")
    require(state["ExitCode"] == "1:0", f"the job has the workers' exit code 1:0, not {state['ExitCode']}\n{tail(log)}")
    wanted = ["error: train.stepz is no config key; nearest: train.steps."]
    require(errors == wanted, f"the log holds the one line {wanted}, not {errors}\n{tail(log)}")
    print(f"job {job}: {state['JobState']}, exit code {state['ExitCode']}, {errors[0]}", flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(sys.argv[1]).resolve()
    subprocess.run([BIN / "python", "-m", "launch.prepare"], cwd=ROOT, check=True)
    pace = statistics.median(record["step_seconds"] for record in torchrun(folder / "pace", 10)[1:])
    steps = max(20, math.ceil(TRAINING_SECONDS / pace))
    print(f"a step takes {pace:.2f} s here: {steps} steps", flush=True)

    interrupted: list[tuple[Path, int, int]] = []

    def compare() -> None:
        require(bool(interrupted), "there is an interrupted run to compare with")
        same_as_uninterrupted(folder, *interrupted[0])

    checks = {
        "a job at its time limit saves, requeues itself and goes on": lambda: interrupted.append(
            interrupted_job(folder, steps)
        ),
        "its numbers are those of an uninterrupted run": compare,
        "a job with a mistyped key fails and is not requeued": lambda: mistyped_job(folder),
    }
    failed = 0
    for name, check in checks.items():
        started = time.monotonic()
        try:
            check()
        except (Failure, subprocess.SubprocessError, OSError) as error:
            failed += 1
            print(f"FAILED: {name}: expected that {error}", flush=True)
        else:
            print(f"passed: {name} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"slurm: {len(checks) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
