"""The manifest of a checkpoint folder: which files it has, and whether they are still what was written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from model.errors import UserError
from train.checkpoint_reader import TensorReader

MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"
_NAME = re.compile(r"step_\d{8}")
_LEFTOVER = re.compile(r"\.step_\d{8}\.(partial|replaced|old)")


def checkpoints(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints, whole or not, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())


def leftovers(folder: Path) -> list[Path]:
    """What a killed save or removal left, by its name."""
    return sorted(path for path in folder.glob(".step_*") if _LEFTOVER.fullmatch(path.name))


def is_ours(folder: Path) -> bool:
    """Whether a folder was written by a run, or is empty: then removing it loses nothing of anybody else."""
    if folder.is_symlink():
        return False
    return (folder / STATE).is_file() or (folder / MANIFEST).is_file() or not any(folder.iterdir())


def entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def checksum(path: Path) -> str:
    """SHA-256 of a file's contents in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, part: int, parts: int, patience: float = 0.0) -> str | None:
    """The first file that disagrees with the manifest, among every `parts`-th one; None if all agree.

    patience: seconds in which a network file system may still show what another node wrote.
    """
    deadline = time.monotonic() + patience
    _shown(folder / MANIFEST, deadline)
    try:
        files = _files(folder)
    except (OSError, ValueError, RecursionError) as error:
        return f"no readable {MANIFEST}: {error}"
    for name, written in sorted(files.items())[part::parts]:
        path = folder / name
        if not _shown(path, deadline):
            return f"{name} is missing"
        if path.stat().st_size != written["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {written['bytes']}"
        if checksum(path) != written["sha256"]:
            return f"{name} has another checksum"
    if part == 0:
        try:
            unlisted = sorted(TensorReader(folder).files() - files.keys())
        except UserError as error:
            return str(error)
        if unlisted:
            return f"{MANIFEST} does not list {unlisted[0]}"
    return None


def _shown(path: Path, deadline: float) -> bool:
    """Whether a file is there, or comes to be seen in time."""
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
        os.listdir(path.parent)  # asks the server anew
    return True


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest. Raises `OSError` or `ValueError` for one that is not as a run writes it."""
    found = json.loads((folder / MANIFEST).read_text())
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    for name, written in files.items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file of the folder")
        if not isinstance(written, dict) or type(written.get("bytes")) is not int or not written.get("sha256"):
            raise ValueError(f"{name} lacks bytes or sha256")
    for name in (STATE, METADATA):
        if name not in files:
            raise ValueError(f"it does not list {name}")
    return files
