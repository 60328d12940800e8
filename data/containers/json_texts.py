"""Records in JSON: one a line, or the items of an array."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.containers.opened import in_batches, intact, opened
from data.corpus.reading import Reading

LINE, ITEM = ":", ": item "
"""Between file and number in the place of a record."""
_BLOCK = 1 << 19
_LONGEST = 1 << 26
"""Characters that an item may have."""
_BLANKS = re.compile(r"[ \t\n\r]*")
_WORD = 12
"""Characters of the longest word that JSON has of its own (-Infinity, or an escaped pair of surrogates)."""
_FINDER = json.JSONDecoder(parse_int=str)  # it looks for the end of an item, which is parsed later
_WRAPPERS = ("data", "rows", "records", "examples", "items", "train")


class JsonTexts(NamedTuple):
    """Some records of a file as JSON, not parsed yet, and the number of the first of them, from one on."""

    path: Path
    mark: str
    """`LINE` or `ITEM`."""
    first: int
    texts: list[bytes]
    columns: None = None
    """Each record has keys of its own."""

    def values(self, reading: Reading) -> Iterator[tuple[str, Any]]:
        """Place and value of each record; one that is not JSON is bad."""
        for number, text in enumerate(self.texts, start=self.first):
            where = f"{self.path}{self.mark}{number}"
            for value in parsed(text, where, reading, "utf-8-sig" if number == 1 else "utf-8"):
                key = _wrapper(value) if self.mark == ITEM and number == len(self.texts) == 1 else ""
                if key:
                    reading.bad(f'{where} holds its records under "{key}"; write that list alone into the file')
                else:
                    yield where, value


def parsed(raw: bytes, where: str, reading: Reading, encoding: str = "utf-8-sig") -> list[Any]:
    """The one value that a text of JSON holds; none if it is blank, or bad, which is noted."""
    try:
        text = raw.decode(encoding)
        return [parse_json(text)] if text.strip() else []
    except UnicodeDecodeError as error:
        reading.bad(f"{where} is no UTF-8 ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        reading.bad(f"{where} is not JSON ({error.msg} at character {error.pos + 1})")
    except ValueError as error:  # a key twice, or a number of too many digits
        reading.bad(f"{where} is not JSON ({error})")
    except RecursionError:
        reading.bad(f"{where} is not JSON that can be read (nested too deep)")
    return []


def parse_json(text: str) -> Any:
    """What a text of JSON holds. Raises `ValueError` for none, and for an object that has a key twice."""
    return json.loads(text, object_pairs_hook=_once)


def lines_of(path: Path, reading: Reading) -> Iterator[JsonTexts]:
    """The lines of a file of JSON lines, or of the span of it that is read."""
    with opened(path, reading.advance) as file:
        lines, before = iter(file), 0
        if reading.span is not None:
            file.seek(reading.span.start)
            lines, before = _first(file, reading.span.stop - reading.span.start), reading.span.line - 1
        for first, some in in_batches(intact(path, LINE, lines, reading)):
            yield JsonTexts(path, LINE, before + first, some)


def _first(file: io.BufferedReader, size: int) -> Iterator[bytes]:
    """Lines that have this many bytes together."""
    while size > 0 and (line := file.readline()):
        size -= len(line)
        yield line


def items_of(path: Path, reading: Reading) -> Iterator[JsonTexts]:
    """The items of the array that a file of JSON holds, or its objects, if they stand one after the other."""
    number = 0
    with opened(path, reading.advance) as file:
        window = _Window(file)

        def items() -> Iterator[bytes]:
            nonlocal number
            try:
                for item in _items(window):
                    number += 1
                    yield item.encode()
            except ValueError as error:
                reading.bad(f"{path}{ITEM}{number + 1} {error}")

        for first, texts in in_batches(intact(path, ITEM, items(), reading)):
            yield JsonTexts(path, ITEM, first, texts)


class _Window:
    """The part of a long text that is held, and the place in it up to which it was read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.held, self.place, self.ended = file, "", 0, False
        self._decoder, self._bytes = codecs.getincrementaldecoder("utf-8")(), 0

    def next(self) -> str:
        """The next character that is no blank, not read yet; empty at the end."""
        while True:
            blanks = _BLANKS.match(self.held, self.place)
            self.place = blanks.end() if blanks else self.place
            if self.place < len(self.held) or self.ended:
                return self.held[self.place : self.place + 1]
            self._more()

    def read(self) -> str:
        """The JSON of the value that begins here, or behind blanks. Raises `ValueError` if there is none."""
        self.next()
        while True:
            problem, unfinished, end = "", False, 0
            try:
                _, end = _FINDER.raw_decode(self.held, self.place)
            except json.JSONDecodeError as error:
                problem = f"is not JSON ({error.msg} at character {error.pos - self.place + 1})"
                word = 1 if self.ended else _WORD
                unfinished = error.msg.startswith("Unterminated") or error.pos > len(self.held) - word
            except RecursionError:
                raise ValueError("is not JSON that can be read (nested too deep)") from None
            if problem and not unfinished:
                raise ValueError(problem)
            if not problem and (end < len(self.held) or self.ended):
                text, self.place = self.held[self.place : end], end
                return text
            if self.ended:
                raise ValueError("is not JSON (the file ends early)")
            if len(self.held) - self.place > _LONGEST:
                raise ValueError(f"has over {_LONGEST:,} characters; write the records into an array, or one a line")
            self._more()

    def _more(self) -> None:
        """Drop what was read, and hold twice as much of the rest."""
        self.held, self.place = self.held[self.place :], 0
        block = self.file.read(max(_BLOCK, len(self.held)))
        waiting = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = self._bytes - waiting + error.start
            raise ValueError(f"is no UTF-8 ({error.reason} at byte {place} of the file)") from None
        self.held += text if self._bytes else text.removeprefix("\ufeff")
        self._bytes, self.ended = self._bytes + len(block), not block


def _items(window: _Window) -> Iterator[str]:
    if window.next() != "[":
        while window.next():
            yield window.read()
        return
    window.place += 1
    if window.next() != "]":
        yield window.read()
        while window.next() == ",":
            window.place += 1
            yield window.read()
    if window.next() != "]":
        raise ValueError(f"is not JSON ({'no comma stands before it' if window.next() else 'the file ends early'})")
    window.place += 1
    if window.next():
        raise ValueError("stands behind the end of the array; write all records into one")


def _wrapper(value: Any) -> str:
    """The key under which an object holds all records of a file, as some programs write them; empty if it is one."""
    if not isinstance(value, dict) or not {"text", "messages"}.isdisjoint(value):
        return ""
    return next((key for key in _WRAPPERS if isinstance(value.get(key), list)), "")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which nothing is lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found
