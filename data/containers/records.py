"""Records of a file, whatever contains them: batches that other processes can parse, and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.containers.arrow import pieces_of
from data.containers.json_texts import items_of, lines_of
from data.containers.opened import is_packed, kind_of
from data.containers.samples import samples_of
from data.containers.tables import rows_of
from data.corpus.reading import Reading


class Batch(Protocol):
    """Some records of a file, not parsed yet; small, and sent to another process as it is."""

    @property
    def path(self) -> Path:
        """The file that they are in."""

    @property
    def columns(self) -> Sequence[str] | None:
        """Keys that its records may have; none where each has its own."""

    def values(self, reading: Reading) -> Iterator[tuple[str, Any]]:
        """Place ("file:line", "file: item 2", "file: row 2") and value of each record; what is none is bad."""


_SEEKABLE = (".parquet", ".arrow", ".feather", ".ipc")
_READERS: dict[str, Callable[[Path, Reading], Iterator[Batch]]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), lines_of),
    ".json": items_of,
    **dict.fromkeys((".csv", ".tsv"), rows_of),
    **dict.fromkeys(_SEEKABLE, pieces_of),
    ".tar": samples_of,
}
CUT_AT_LINES = (".jsonl", ".ndjson")
"""Types of file that can be read from any line on, if they are not compressed."""
RECORDS = tuple(_READERS)
"""Types of file that hold records; all but the columns of Arrow and Parquet may be compressed."""


def holds_records(path: Path) -> bool:
    """Whether a file holds records by its suffix."""
    return kind_of(path) in _READERS


def container_of(path: Path) -> str:
    """What tells apart how the same bytes are read: the type of records, or text, and whether they are unpacked."""
    kind = kind_of(path) if holds_records(path) else "text"
    return f"{kind}{path.suffix.lower()}" if is_packed(path) else kind


def must_be_unpacked(path: Path) -> bool:
    """Whether a file is compressed that can only be read in any order."""
    return is_packed(path) and kind_of(path) in _SEEKABLE


def records_of(path: Path, reading: Reading) -> Iterator[Batch]:
    """The records of a file, few enough at once for what they hold to be held."""
    if path.stat().st_size:
        yield from _READERS[kind_of(path)](path, reading)


def read_records(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """Place and value of each record of a file."""
    for batch in records_of(path, reading):
        yield from batch.values(reading)
