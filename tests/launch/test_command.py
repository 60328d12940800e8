"""The command `gemwright` and the checkout's `torchrun` as they are started, and packages that are somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from launch.command import COMMANDS
from launch.torchrun import with_script
from launch.torchrun_script import write

ROOT = Path(__file__).parents[2]


def start(*command: str | Path, path: list[Path], cwd: Path) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def gemwright(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    return start(sys.executable, "-m", "launch.command", *arguments, path=[ROOT], cwd=cwd)


def test_help_has_an_example_of_every_command(tmp_path: Path) -> None:
    status, out, error = gemwright("--help", cwd=tmp_path)
    assert (status, error) == (0, "")
    for name, command in COMMANDS.items():
        assert f"gemwright {name} {command.example}\n" in out and command.help in out
        assert find_spec(command.module) is not None
    assert gemwright(cwd=tmp_path) == (1, out, "")


def test_a_command_is_told_its_own_arguments(tmp_path: Path) -> None:
    status, out, error = gemwright("prepare", "sauce=texts", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert (
        error == "error: sauce is no argument; nearest: source "
        "(all: source, tokenizer, vocab_size, cache, on_bad, strict, workers).\n"
    )


def test_an_unknown_command_names_the_nearest(tmp_path: Path) -> None:
    status, out, error = gemwright("trian", "+variant=31b", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert error == f"error: 'trian' is no command; nearest: train (all: {', '.join(COMMANDS)}).\n"


@pytest.mark.parametrize(
    ("options", "own"),
    [
        (["--nproc", "8"], []),
        (["--nproc=8"], ["+variant=31b", "train.steps=3"]),
        (["--nnodes", "2", "--node-rank", "0", "--rdzv-conf", "timeout=9", "--nproc", "8"], ["run=runs/big", "out=x"]),
    ],
)
def test_options_of_the_launcher_come_first(options: list[str], own: list[str]) -> None:
    assert with_script([*options, *own], "main.py") == [*options, "main.py", *own]


def test_an_option_of_the_launcher_behind_other_arguments_is_refused(tmp_path: Path) -> None:
    status, out, error = gemwright("train", "+variant=31b", "--nproc", "8", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert error == (
        "error: --nproc comes too late; options of torchrun go first, as in: gemwright train --nproc 8 ...\n"
    )


def test_options_of_a_run_come_behind_those_of_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {dir: runs/mine}\n")
    status, out, error = gemwright("train", "--config", "mine.yaml", "run.seed=5", "--nproc", "2", cwd=tmp_path)
    assert (status, out, error.startswith("error: --nproc comes too late")) == (1, "", True)
    words = ["+variant=tiny_e4b", "--config=mine.yaml", "-m", "run.seed=5,6", "--cfg", "job"]
    status, out, error = gemwright("train", "--nproc", "2", *words, cwd=tmp_path)
    assert (status, error) == (0, ""), "one process sweeps, not one of torchrun's"
    assert [line for line in out.splitlines() if line.startswith(("---", "#", "  dir:", "  seed:"))] == [
        *("---", "# run.seed=5", "  dir: runs/mine/0_seed_5", "  seed: 5"),
        *("---", "# run.seed=6", "  dir: runs/mine/1_seed_6", "  seed: 6"),
    ]


@pytest.mark.parametrize("command", [["launch.command", "variants"], ["train.main"]], ids=" ".join)
@pytest.mark.parametrize("name", ["data.py", "data/__init__.py"])
def test_somebody_else_s_package_is_named(command: list[str], name: str, tmp_path: Path) -> None:
    foreign = tmp_path / "theirs" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("raise RuntimeError('must not be imported')")
    place = tmp_path / "theirs" / Path(name).parts[0]
    path, elsewhere = [place.parent, ROOT], tmp_path / "elsewhere"
    elsewhere.mkdir()
    status, out, error = start(sys.executable, "-m", *command, path=path, cwd=elsewhere)
    assert (status, out) == (1, "")
    assert error == (
        f"error: the package 'data' is {place}, not Gemwright's {ROOT / 'data'}; start in another folder, "
        f"take {place.parent} off PYTHONPATH, or rename or uninstall it.\n"
    )


def test_a_folder_of_data_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    status, _, error = start(sys.executable, "-m", "launch.command", "--help", path=[tmp_path, ROOT], cwd=tmp_path)
    assert status == 0, error


def test_the_checkout_s_torchrun_takes_nproc(tmp_path: Path) -> None:
    python = tmp_path / "an environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python.parent.parent], check=True)
    script = python.with_name("torchrun")
    script.write_text("torch's own")
    assert write(python) == script
    written = script.stat().st_mtime_ns
    assert write(python) == script and script.stat().st_mtime_ns == written
    (tmp_path / "rank.py").write_text("import os, sys; print(os.environ['WORLD_SIZE'], sys.argv[1:])")
    path = [ROOT, Path(torch.__file__).parents[1]]
    status, out, error = start(script, "--nproc", "1", "rank.py", "a b", path=path, cwd=tmp_path)
    assert (status, out) == (0, "1 ['a b']\n"), error
