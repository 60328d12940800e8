"""Records in columns: .parquet, and Arrow's files and streams, as `datasets` saves them; read by pyarrow.

Arrow gives an object every key that another object of its column has, as a null. A null is therefore read as a key that
is not there, except in a list, and in what a column holds as JSON. No threads are started: the process forks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.containers.json_texts import parse_json
from data.containers.opened import library
from data.containers.tables import ROW
from data.corpus.reading import Reading

_ROWS, _SIZE = 256, 1 << 19
"""Rows of a piece, by number and by bytes."""
_BUFFER = 1 << 20
_FILE = b"ARROW1"
"""Beginning of a file that has an index; others are streams."""


class Pieces(NamedTuple):
    """Some rows as an Arrow stream and the number of the first of them, from one on."""

    path: Path
    first: int
    columns: Sequence[str]
    rows: bytes

    def values(self, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and value of each row; one with a text that is no UTF-8, or no JSON where it must be, is bad."""
        arrow = library("pyarrow", self.path)
        rows = arrow.ipc.open_stream(self.rows).read_next_batch()
        columns = [(name, rows[name], _reader(arrow, rows[name].type)) for name in self.columns]
        for index in range(rows.num_rows):
            where = f"{self.path}{ROW}{self.first + index}"
            try:
                cells = ((name, column[index].as_py(), read) for name, column, read in columns)
                row = {name: read(cell) for name, cell, read in cells if cell is not None}
            except (ValueError, RecursionError) as error:
                reading.bad(f"{where} cannot be read ({error})")
            else:
                yield where, row


def pieces_of(path: Path, reading: Reading) -> Iterator[Pieces]:
    """The rows of a file in columns, few enough at once for what they hold to be held."""
    arrow, number, told = library("pyarrow", path), 0, 0
    read = _parquet if path.suffix.lower() == ".parquet" else _arrow
    try:
        for rows, share in read(path):
            twice = [name for name in rows.schema.names if rows.schema.names.count(name) > 1]
            if twice:
                reading.bad(f"{path} has the column {twice[0]!r} twice")
                return
            step = max(1, min(_ROWS, rows.num_rows * _SIZE // max(rows.nbytes, 1)))
            for start in range(0, rows.num_rows, step):
                piece = _stream(arrow, rows.slice(start, step))
                yield Pieces(path, number + start + 1, rows.schema.names, piece)
            number += rows.num_rows
            done = int(share * path.stat().st_size)
            reading.advance(done - told)
            told = done
    except (arrow.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reading.bad(f"{path}{ROW}{number + 1} cannot be read ({lines[0].rstrip('.')})")


def _parquet(path: Path) -> Iterator[tuple[Any, float]]:
    """Rows, and the share of the file that was read with them."""
    # A buffer of its own instead of whole row groups, which may be of any size.
    with library("pyarrow.parquet", path).ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
        read = 0
        for rows in file.iter_batches(_ROWS, use_threads=False):
            read += rows.num_rows
            yield rows, read / file.metadata.num_rows


def _arrow(path: Path) -> Iterator[tuple[Any, float]]:
    """Batches of rows, and the share of the file that was read with them."""
    arrow = library("pyarrow", path)
    options = arrow.ipc.IpcReadOptions(use_threads=False)
    with arrow.memory_map(str(path)) as source:
        indexed = source.read(len(_FILE)) == _FILE
        source.seek(0)
        if indexed:
            file = arrow.ipc.open_file(source, options=options)
            for index in range(file.num_record_batches):
                yield file.get_batch(index), (index + 1) / file.num_record_batches
        else:
            for rows in arrow.ipc.open_stream(source, options=options):
                yield rows, source.tell() / source.size()


def _stream(arrow: Any, rows: Any) -> bytes:
    """Rows as bytes, of which none are left over from others."""
    out = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(out, rows.schema) as writer:
        writer.write_batch(rows)
    whole: bytes = out.getvalue().to_pybytes()
    return whole


def _reader(arrow: Any, kind: Any) -> Callable[[Any], Any]:
    """What makes a plain value of a cell of this type that is no null."""
    types = arrow.types
    if isinstance(kind, arrow.JsonType):
        return parse_json
    if types.is_struct(kind):
        fields = {field.name: _reader(arrow, field.type) for field in kind}
        return lambda cell: {name: fields[name](value) for name, value in cell.items() if value is not None}
    if types.is_map(kind):
        value_of = _reader(arrow, kind.item_type)
        return lambda cell: {name: value_of(value) for name, value in cell if value is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item_of = _reader(arrow, kind.value_type)
        return lambda cell: [None if item is None else item_of(item) for item in cell]
    return lambda cell: cell
