"""The launcher's own spelling, and that the rest stays torch's."""

from __future__ import annotations

import signal

import pytest

from launch.torchrun import parse


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nproc", "8", "train/main.py", "+variant=31b"],
        ["--nproc=8", "train/main.py", "+variant=31b"],
        ["--nproc-per-node", "8", "train/main.py", "+variant=31b"],
        ["--nproc_per_node=8", "train/main.py", "+variant=31b"],
        ["--standalone", "--nproc", "8", "train/main.py", "+variant=31b"],
    ],
)
def test_every_spelling_of_processes_per_node(arguments: list[str]) -> None:
    parsed = parse(arguments)
    assert parsed.nproc_per_node == "8"
    assert (parsed.training_script, parsed.training_script_args) == ("train/main.py", ["+variant=31b"])


def test_the_script_s_own_arguments_are_left_alone() -> None:
    parsed = parse(["--nproc", "2", "x.py", "--nproc", "5", "--nnodes", "3"])
    assert parsed.nproc_per_node == "2" and parsed.nnodes == "1:1"
    assert parsed.training_script_args == ["--nproc", "5", "--nnodes", "3"]
    assert parse(["x.py"]).nproc_per_node == "1"


def test_signals_that_are_ignored_are_not_handed_on() -> None:
    """Which others are depends on how the tests were started: nohup ignores SIGHUP, a shell's & SIGINT and SIGQUIT."""
    handed_on = parse(["x.py"]).signals_to_handle.split(",")
    assert "SIGTERM" in handed_on and "SIGUSR1" in handed_on
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert parse(["x.py"]).signals_to_handle.split(",") == [name for name in handed_on if name != "SIGUSR1"]
    finally:
        signal.signal(signal.SIGUSR1, before)
