"""Lines of `metrics.jsonl` and `samples.jsonl`: appended one by one, read back whatever a kill or an editor left."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from train.files import replace_file

log = logging.getLogger("gemwright")


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line to the end of a file, which is made if it is missing."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def read(path: Path, numbers: tuple[str, ...] = ("step",)) -> list[dict[str, Any]]:
    """The records of a file, none if it is missing; lines that lack one of these numbers are named and passed over."""
    lines = _lines(path)
    records = [_record(line, numbers) for line in lines]
    wrong = [number for number, record in enumerate(records, start=1) if record is None]
    if wrong and wrong != [len(lines)]:  # the last line of a killed run may be half written
        log.warning(
            "%s: %d lines are no records, the first is line %d; they are passed over", path, len(wrong), wrong[0]
        )
    return [record for record in records if record is not None]


def cut(path: Path, last_step: int) -> None:
    """Drop the records of later steps than `last_step`, and what a kill left of a last line."""
    kept = [line for line in _lines(path) if (record := _record(line)) is None or record["step"] <= last_step]
    if kept and _record(kept[-1]) is None:
        kept.pop()
    if path.exists():
        replace_file(path, "".join(line + "\n" for line in kept))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.exists() else []


def _record(line: str, numbers: tuple[str, ...] = ("step",)) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and all(_is_number(found.get(name)) for name in numbers):
        return found
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
