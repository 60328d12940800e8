"""What machines lack or leave behind, and a run does without, or names in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import MAIN, ROOT
from tests.harness.runs import overrides

THERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
DRIVER = """
import sys
sys.argv = sys.argv[1:]
{before}
import runpy
if __name__ == "__main__":
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
NO_LOCKS = """
import errno, fcntl, os
def refuse(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.lockf = fcntl.flock = refuse
fsync = os.fsync
def only_files(descriptor):
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    fsync(descriptor)
os.fsync = only_files
"""
MACOS = """
import multiprocessing, os
del os.sched_getaffinity
multiprocessing.set_start_method("spawn")
"""


def driven(before: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """One process on a platform that is played by what runs before the program."""
    script = folder / "driver.py"
    script.write_text(DRIVER.format(before=before))
    command = [sys.executable, str(script), MAIN, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_a_file_system_without_locks_and_durable_folders_is_a_warning(tmp_path: Path) -> None:
    done = driven(NO_LOCKS, overrides(tmp_path, "train.steps=1"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the file system has no locks, so a second job in this folder would not be noticed" in done.stdout
    assert done.stdout.count("cannot make folders durable") == 1, done.stdout


def test_what_macos_lacks_is_not_needed(tmp_path: Path) -> None:
    done = driven(MACOS, overrides(tmp_path, "train.steps=2", "data.workers=1"), tmp_path)
    assert done.returncode == 0 and "done: step 2" in done.stdout, done.stderr


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="mounts a file system of its own")
def test_little_shared_memory_suffices(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, "train.steps=2", "data.workers=2", "train.global_batch_size=16")
    arguments += ["train.micro_batch_size=16", "data.sequence_length=128"]
    command = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} {MAIN} " + " ".join(arguments)
    if subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0:
        pytest.skip("this machine lets nobody have mounts of its own")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0 and "done: step 2" in done.stdout, done.stdout + done.stderr


LEFTOVERS: list[tuple[dict[str, str], str]] = [
    ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 is set in the environment without MASTER_ADDR"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment without RANK"),
    ({"RANK": "banana", "WORLD_SIZE": "1"} | THERE, "RANK=banana in the environment"),
    ({"RANK": "2", "WORLD_SIZE": "2"} | THERE, "contradict each other"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "started by SLURM in 2 tasks without torchrun"),
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "started by MPI in 4 tasks without torchrun"),
]


def test_leftovers_of_launchers_are_named() -> None:
    started = [
        subprocess.Popen([sys.executable, MAIN], env=os.environ | environment, stderr=subprocess.PIPE, text=True)
        for environment, _ in LEFTOVERS
    ]
    for process, (_, message) in zip(started, LEFTOVERS, strict=True):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 1 and said.startswith("error: ") and message in said, said
        assert said.count("\n") == 1


def test_an_address_left_alone_is_no_matter(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, "train.steps=1")
    environment = os.environ | {"MASTER_ADDR": "nowhere", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    done = subprocess.run(
        [sys.executable, MAIN, *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / ".lock").read_text())["host"] == os.uname().nodename
