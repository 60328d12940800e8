"""Files as what they hold: counted while they are read, and unpacked where their last suffix says so."""

from __future__ import annotations

import bz2
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data.corpus.reading import Reading, SourceError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BUFFER = 1 << 18
_PACKED = 1 << 12
"""Packed bytes that are unpacked at once; they may grow by a factor of a thousand and more."""
_WINDOW = 1 << 31
"""The longest that the program zstd makes (--long=31)."""
_MOST, _SIZE = 256, 1 << 19
"""Records of a batch, by number and by bytes or characters."""

Record = TypeVar("Record")


class DamagedError(Exception):
    """A compressed file that ends early, or that was changed."""


def kind_of(path: Path) -> str:
    """What a file holds by its suffix in small letters, without that of its compression."""
    return Path(path.stem if is_packed(path) else path.name).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether a file is compressed by its last suffix."""
    return path.suffix.lower() in COMPRESSIONS


def opened(path: Path, advance: Callable[[int], None] = lambda size: None) -> io.BufferedReader:
    """What a file holds, unpacked; `advance` is told how many bytes of the file itself were read.

    Reading raises `DamagedError` where a compressed file ends early or was changed.
    """
    file = _Counted(path, advance)
    if not is_packed(path):
        return io.BufferedReader(file, _BUFFER)
    return io.BufferedReader(_Unpacked(io.BufferedReader(file, _BUFFER), *_compression(path)), _BUFFER)


def library(name: str, path: Path) -> Any:
    """A package that only some files need. Raises `SourceError`, which says how to get it, where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise SourceError(f"{path} takes {package} to be read; pip install gemwright[data].") from None


def intact(path: Path, mark: str, records: Iterable[Record], reading: Reading) -> Iterator[Record]:
    """Records up to where their file is damaged, which is noted as bad."""
    number = 1
    try:
        for record in records:
            yield record
            number += 1
    except DamagedError as error:
        reading.bad(f"{path}{mark}{number} cannot be unpacked ({error})")


def in_batches(records: Iterable[Record], size: Callable[[Any], int] = len) -> Iterator[tuple[int, list[Record]]]:
    """Records with the number of the first of them, from one on: few enough at once for what they hold to be held."""
    first, held, total = 1, list[Record](), 0
    for record in records:
        held.append(record)
        total += size(record)
        if len(held) == _MOST or total >= _SIZE:
            yield first, held
            first, held, total = first + len(held), [], 0
    if held:
        yield first, held


class _Counted(io.FileIO):
    """A file that tells how much of it is read."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as the file goes."""
        size = super().readinto(buffer) or 0
        self._advance(size)
        return size


class _Unpacked(io.RawIOBase):
    """What one compressed stream after the other holds; `begin` makes what unpacks one, and `error` is its own."""

    def __init__(self, packed: io.BufferedReader, begin: Callable[[], Any], error: type[Exception]) -> None:
        self._packed, self._begin, self._error = packed, begin, error
        self._stream: Any = None
        self._rest, self._held = b"", memoryview(b"")

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as what was unpacked goes; 0 at the end."""
        while not self._held and self._unpack():
            pass
        into = memoryview(buffer)
        size = min(len(into), len(self._held))
        into[:size], self._held = self._held[:size], self._held[size:]
        return size

    def close(self) -> None:
        """Close the compressed file too."""
        self._packed.close()
        super().close()

    def _unpack(self) -> bool:
        """Unpack some more, perhaps to nothing yet; no where the file has ended."""
        block = self._rest or self._packed.read(_PACKED)
        if not block:
            if self._stream is not None:
                raise DamagedError("the file ends early")
            return False
        if self._stream is None:
            self._rest = block = block.lstrip(b"\0")  # blocks of tapes and .xz are filled up
            if not block:
                return True
            self._stream = self._begin()
        try:
            self._held = memoryview(self._stream.decompress(block))
        except self._error as error:
            raise DamagedError(str(error) or type(error).__name__) from None
        self._rest = self._stream.unused_data
        if self._stream.eof:
            self._stream = None
        return True


def _compression(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """What unpacks a stream of this file, and the error that it raises."""
    match path.suffix.lower():
        case ".gz":
            return partial(zlib.decompressobj, 16 + zlib.MAX_WBITS), zlib.error
        case ".bz2":
            return bz2.BZ2Decompressor, OSError
        case ".xz":
            return lzma.LZMADecompressor, lzma.LZMAError
    zstandard = library("zstandard", path)
    return zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj, zstandard.ZstdError
