"""Parts of a source, each prepared by itself: they follow from its files alone, not from who prepares them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.containers.opened import is_packed
from data.containers.records import CUT_AT_LINES
from data.corpus.reading import Span

PART_BYTES = 1 << 23
"""About what a part holds: small files together, or a span of a large file of lines."""
_MOST_FILES = 10_000
_BLOCK = 1 << 20


class Part(NamedTuple):
    """Files [first, stop) of a source, of which a single one may be read in a span only."""

    first: int
    stop: int
    size: int
    span: Span | None = None


def cut(files: Sequence[Path]) -> list[Part]:
    """The parts of a source, in the order of its files."""
    parts, first, size = list[Part](), 0, 0
    for number, path in enumerate(files):
        found = path.stat().st_size
        large = found > PART_BYTES
        if number > first and (size + found > PART_BYTES or number - first == _MOST_FILES):
            parts.append(Part(first, number, size))
            first, size = number, 0
        size += found
        if large and path.suffix.lower() in CUT_AT_LINES and not is_packed(path):
            parts += [Part(number, number + 1, span.stop - span.start, span) for span in _spans(path, found)]
            first, size = number + 1, 0
    if first < len(files):
        parts.append(Part(first, len(files), size))
    return parts


def _spans(path: Path, size: int) -> Iterator[Span]:
    """Spans that end where a line does."""
    with path.open("rb") as file:
        start, line = 0, 1
        while start < size:
            lines, left = 0, min(PART_BYTES, size - start)
            while left and (block := file.read(min(_BLOCK, left))):
                lines, left = lines + block.count(b"\n"), left - len(block)
            if block[-1:] != b"\n":
                lines += file.readline()[-1:] == b"\n"
            stop = file.tell()
            yield Span(start, stop, line)
            start, line = stop, line + lines
