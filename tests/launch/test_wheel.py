"""Gemwright as a wheel: it owns one command, trains without a checkout, and leaves torch's `torchrun` alone."""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from tests.harness.runs import losses, overrides
from train.own_packages import PACKAGES

ROOT = Path(__file__).parents[2]
NO_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "runs", "tests", "wandb", "*.egg-info", "__pycache__")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel(folder: Path) -> Path:
    """The wheel of this tree, built from a copy: setuptools would leave its build folder, and reuse an old one."""
    shutil.copytree(ROOT, folder / "source", ignore=NO_SOURCE)
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", *build, folder / "source", cwd=folder)
    (built,) = folder.glob("gemwright-*.whl")
    return built


def scripts_of_torch(folder: Path) -> Path:
    """A wheel with the entry points of the torch that is installed here and none of its 500 MB."""
    torch = importlib.metadata.distribution("torch")
    info = f"torch-{torch.version}.dist-info"
    built = folder / f"torch-{torch.version}-py3-none-any.whl"
    with zipfile.ZipFile(built, "w") as archive:
        for name in ("METADATA", "entry_points.txt"):
            archive.writestr(f"{info}/{name}", torch.read_text(name) or "")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return built


def test_a_wheel_trains_outside_the_checkout_and_leaves_torchrun_alone(tmp_path: Path) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python, commands = environment / "bin" / "python", environment / "bin"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))

    def pip(*arguments: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=tmp_path)

    pip("install", "--quiet", "--no-index", "--no-deps", scripts_of_torch(tmp_path))
    torchrun, before = (commands / "torchrun").read_bytes(), {path.name for path in commands.iterdir()}
    built = wheel(tmp_path)
    pip("install", "--quiet", "--no-index", "--no-deps", built)
    names = zipfile.ZipFile(built).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {"data/chat/gemma4.jinja", "data/chat/page.html", "data/corpus/open.py", "data/media/read.py"} <= {*names}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {*PACKAGES, info}
    record = (site / info / "RECORD").read_text().splitlines()
    assert [line.partition(",")[0] for line in record if line.startswith("..")] == ["../../../bin/gemwright"]
    assert {path.name for path in commands.iterdir()} == {*before, "gemwright"}
    assert (commands / "torchrun").read_bytes() == torchrun

    # Behind its own packages this environment sees those the tests run with, a checkout's finder not among them:
    # a folder that a .pth names is searched, and the .pth files in it are not read. pip is to see none of them.
    borrowed = site / "borrowed.pth"
    borrowed.write_text("".join(f"{path}\n" for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    command = commands / "gemwright"
    arguments = ["+variant=tiny_e4b", *overrides(tmp_path)]
    run(command, "train", *arguments, "train.steps=2", cwd=elsewhere)
    assert len(losses(tmp_path / "run")) == 2
    run(command, "train", "--nproc", "2", *arguments, "train.steps=3", cwd=elsewhere)  # goes on, on two ranks
    assert len(losses(tmp_path / "run")) == 3 and all(map(math.isfinite, losses(tmp_path / "run")))
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()
    assert "31,273,086,512" in run(command, "variants", "31b", cwd=elsewhere)
    assert not list(elsewhere.iterdir())

    borrowed.unlink()
    pip("uninstall", "--quiet", "--yes", "gemwright")
    assert {path.name for path in commands.iterdir()} == before
    assert not {path.name for path in site.iterdir()} & top
    assert (commands / "torchrun").read_bytes() == torchrun
    borrowed.write_text(f"{sysconfig.get_path('platlib')}\n")
    assert "--nproc-per-node" in run(commands / "torchrun", "--help", cwd=elsewhere)
