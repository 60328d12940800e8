"""The program as it is started: exact command lines, and mistakes that end in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.runs import overrides

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MAIN = str(ROOT / "train" / "main.py")


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


def test_a_run_says_each_thing_once_and_nothing_of_its_libraries(tmp_path: Path) -> None:
    """Libraries start with empty caches here, as on a new machine."""
    caches = {f"{name}_HOME": str(tmp_path / "caches") for name in ("XDG_CACHE", "XDG_CONFIG")}
    environment = os.environ | caches | {"MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    words = overrides(tmp_path, "train.steps=2", "checkpoint.every=1", "export.at_end=true", "train.log_every=1")
    command = [str(BIN / "torchrun"), "--nproc", "2", MAIN, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(set(said)) == len(said) and sum(line.startswith("exported to") for line in said) == 1
    assert (tmp_path / "run" / "loss.png").exists()
    foreign = re.compile(r"font|matplotlib|Warning|torch\.distributed|^[IWE]\d{4} ")
    assert not [line for line in said if foreign.search(line)]
    assert "Warning" not in done.stderr, done.stderr


SHORT = ["train.steps=2", "train.sample_every=2", "train.sample_tokens=4"]


@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc", "2"],
        ["torchrun", "--nproc-per-node", "2"],
        ["torchrun", "--nproc_per_node=2", "--master-port=29611"],
        ["python"],
    ],
    ids=" ".join,
)
def test_the_command_lines_work_from_another_folder(launcher: list[str], tmp_path: Path) -> None:
    done = run([*launcher, MAIN, "+variant=tiny_31b", *overrides(tmp_path, *SHORT)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2 | loss" in done.stdout
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer.json",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"corpus.jsonl", "cache", "run"}, "Hydra must not make folders"
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    expected = (
        "step loss grad_norm lr tokens_seen tokens_per_second tokens_per_second_per_device "
        "model_tflops_per_device mfu peak_memory_gib step_seconds data_seconds"
    )
    assert set(expected.split()) <= set(record)
    assert record["tokens_seen"] == 2 * 8 * 48


def test_from_the_checkout_as_a_module(tmp_path: Path) -> None:
    done = run([str(BIN / "python"), "-m", "train.main", *overrides(tmp_path, "train.steps=1")], ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+train.stepz=3"], "error: train.stepz is no config key; nearest: train.steps."),
        (["+variant=32b"], "error: variant=32b does not exist; nearest: "),
        (["train.global_batch_size=7"], "does not divide among 2 data-parallel ranks; nearest: 6."),
        (["parallel.dp_shard=3"], "nearest legal: parallel.dp_shard=2."),
        (["data.source=/nowhere"], "error: data.source=/nowhere names no text"),
        (["data.tokenizer=/nowhere"], "error: data.tokenizer=/nowhere does not exist"),
        (["run.resume=/nowhere"], "checkpoint /nowhere cannot be read"),
        (["run.dir=/proc/run"], "run.dir=/proc/run cannot be used"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line_from_one_rank(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(["torchrun", "--nproc", "2", MAIN, *overrides(tmp_path, *arguments)], tmp_path)
    words = [line for line in done.stderr.splitlines() if line and "torch/distributed/run.py" not in line]
    errors = [line for line in words if line.startswith("error")]
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1 and message in errors[0], done.stderr
