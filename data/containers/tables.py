"""Records in tables of text, .csv and .tsv: the first row names the columns, and every value is a string."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from data.containers.opened import in_batches, intact, kind_of, opened
from data.corpus.reading import Reading

ROW = ": row "
"""Between file and number in the place of a record."""
_LONGEST = 1 << 26
"""Characters that a cell may have."""
_Row: TypeAlias = list[str] | csv.Error


class Rows(NamedTuple):
    """Some rows of a table and the number of the first of them, from one on; the header is none."""

    path: Path
    first: int
    columns: Sequence[str]
    rows: list[_Row]

    def values(self, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and value of each row; one that is no UTF-8, or has more or fewer cells than the header, is bad."""
        for number, row in enumerate(self.rows, start=self.first):
            where = f"{self.path}{ROW}{number}"
            if isinstance(row, csv.Error):
                reading.bad(f"{where} is not CSV ({row})")
            elif len(row) != len(self.columns):
                cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
                reading.bad(f"{where} has {cells} where the header has {len(self.columns)}")
            elif not _is_utf8(row):
                reading.bad(f"{where} is no UTF-8")
            else:
                yield where, dict(zip(self.columns, row, strict=True))


def rows_of(path: Path, reading: Reading) -> Iterator[Rows]:
    """The rows of a table of text."""
    csv.field_size_limit(_LONGEST)  # it is the process's; a conversation is longer than the default allows
    with opened(path, reading.advance) as file:
        # What is no UTF-8 comes as halves of surrogate pairs, which makes its row bad and no other.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        table = csv.reader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        rows = intact(path, ROW, _rows(table), reading)
        header = next(rows, [])
        problem = _problem(header)
        if problem:
            reading.bad(f"{path} {problem}")
        elif not isinstance(header, csv.Error):
            for first, some in in_batches(rows, _length):
                yield Rows(path, first, header, some)


def _rows(table: Iterator[list[str]]) -> Iterator[_Row]:
    """Rows that are not blank, and in the place of one that cannot be read the error."""
    while True:
        try:
            row: _Row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            row = error
        if row:
            yield row


def _problem(header: _Row) -> str:
    if isinstance(header, csv.Error):
        return f"has a header that is not CSV ({header})"
    if not _is_utf8(header):
        return "has a header that is no UTF-8"
    twice = [name for name in header if header.count(name) > 1]
    return f"has the column {twice[0]!r} twice" if twice else ""


def _is_utf8(row: list[str]) -> bool:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return False
    return True


def _length(row: _Row) -> int:
    return 0 if isinstance(row, csv.Error) else sum(map(len, row))
