"""The folder that a cleaning fills, and the files of its source as they are dealt to tasks.

out/documents/00000.jsonl.zst   a shard of each task that has documents left; data.source=out/documents
out/report.json                 what was dropped, and why; written last
out/clean.json                  what was asked for, and of which files
out/logs/STAGE/                 completions/ by which a killed cleaning goes on, logs/, stats/, tally/
out/work/                       what stages hand on; gone at the end
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.clean.settings import MOST_TASKS, CleanError, Cleaning, deciding
from data.corpus.reading import SourceError
from data.corpus.sources import source_files

_TASK = 16_000_000
"""Bytes of files that a task reads, where few tasks are enough."""


@dataclass(frozen=True)
class Folder:
    """Paths of a cleaning's folder."""

    out: Path

    @property
    def documents(self) -> Path:
        """Shards of what is left."""
        return self.out / "documents"

    @property
    def report(self) -> Path:
        """What was dropped."""
        return self.out / "report.json"

    @property
    def asked(self) -> Path:
        """What was asked for."""
        return self.out / "clean.json"

    @property
    def work(self) -> Path:
        """What one stage leaves for the next."""
        return self.out / "work"

    @property
    def jobs(self) -> Path:
        """Numbers of the jobs that SLURM was given last."""
        return self.out / "logs" / "jobs.txt"

    def logs(self, stage: str) -> Path:
        """What a stage keeps of itself."""
        return self.out / "logs" / stage


@dataclass(frozen=True)
class Plan:
    """The files of a source by the task that reads them, in the source's order, and how many others lie beside them."""

    tasks: tuple[tuple[str, ...], ...]
    passed_over: dict[str, int]

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # nothing in it changes, and it may name a million files


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def make_plan(asked: Cleaning) -> Plan:
    """The files of the source, dealt to tasks by their sizes alone. Raises `SourceError` where there are none."""
    found = source_files(asked.source)
    files = [path.absolute() for path in found.files]
    out = Path(asked.out).expanduser().absolute()
    inside = next((path for path in files if path.is_relative_to(out)), None)
    if inside:
        raise CleanError(f"out={asked.out} holds {inside} of the source; give another folder.")
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    wanted = min(asked.tasks or -(-total // _TASK) or 1, MOST_TASKS)
    dealt: dict[int, list[str]] = {}
    before = 0
    for path, size in zip(files, sizes, strict=True):
        dealt.setdefault(min((2 * before + size) * wanted // max(2 * total, 1), wanted - 1), []).append(str(path))
        before += size
    return Plan(tuple(map(tuple, dealt.values())), found.passed_over)


def begin(asked: Cleaning, plan: Plan) -> Folder:
    """The folder to fill: a new one, or one in which the same cleaning was begun. Raises `CleanError` for any other."""
    folder = Folder(Path(asked.out).expanduser().absolute())
    wanted = json.dumps(
        {"settings": deciding(asked), "tasks": [[_state(name) for name in task] for task in plan.tasks]}
    )
    if set(str(folder.out)) & set("*?[]") or "::" in str(folder.out):
        raise CleanError(
            f"out={folder.out} has *, ?, [, ] or :: in it, which datatrove takes for a pattern; give another."
        )
    try:
        if folder.asked.is_file():
            _compare(asked.out, json.loads(folder.asked.read_text(encoding="utf-8")), json.loads(wanted))
            return folder
        if folder.out.is_dir():
            other = next((path.name for path in sorted(folder.out.iterdir()) if path.name != ".clean.json.part"), None)
            if other:
                raise CleanError(f"out={asked.out} holds {other}, which no cleaning wrote; give a new folder.")
        write_whole(folder.asked, wanted)
    except OSError as error:
        raise unwritable(folder.out, error) from None
    return folder


@contextmanager
def held(folder: Folder) -> Iterator[None]:
    """No other process of this machine fills the folder meanwhile. Raises `CleanError` if one does."""
    with folder.asked.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CleanError(f"{folder.out} is being filled by another process; wait for it, or end it.") from None
        except OSError:  # a file system without locks
            pass
        yield


def unwritable(path: Path, error: OSError) -> CleanError:
    """The error for a folder in which nothing can be written any more."""
    return CleanError(
        f"{error.filename or path} cannot be written or read ({error.strerror or error}); free space or give rights, "
        "and start the same command again: it goes on."
    )


def _state(name: str) -> list[Any]:
    try:
        found = os.stat(name)
    except OSError as error:
        raise SourceError(
            f"{name} cannot be read ({error.strerror}); the source changes, wait until it does not."
        ) from None
    return [name, found.st_size, found.st_mtime_ns]


def _compare(out: str, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted["settings"].items():
        before = begun["settings"].get(name)
        if before != value:
            raise CleanError(
                f"out={out} was begun with {name}={_text(before)}, not {_text(value)}; give that, or a new folder."
            )
    if begun["tasks"] != wanted["tasks"]:
        then, now = ({name: state for task in both["tasks"] for name, *state in task} for both in (begun, wanted))
        changed = next(
            (name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)), "the order"
        )
        raise CleanError(
            f"out={out} was begun with other files ({changed} is new, gone or changed); give a new folder."
        )


def _text(value: Any) -> str:
    return (
        f"[{','.join(value)}]"
        if isinstance(value, list)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
