"""Where documents come from: the corpus every Python brings along, or files named by the user."""

from __future__ import annotations

import codecs
import errno
import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.counts import add
from data.corpus.reading import Reading, SourceError, unreadable

PYTHON_STDLIB = "python_stdlib"
TEXTS = (".txt", ".md", ".rst", ".py", ".jsonl")
"""Types of file that are read from a folder; each is one text, but .jsonl has one in every line."""
_MEDIA = frozenset(
    f".{kind}"
    for kind in [
        "png",
        "jpg",
        "jpeg",
        "webp",
        "gif",
        "bmp",
        "wav",
        "mp3",
        "flac",
        "ogg",
        "m4a",
        "mp4",
        "mov",
        "webm",
        "mkv",
        "avi",
    ]
)
_CONVERT = {
    ".json": "write its objects into a .jsonl, one a line",
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx"), "write its rows into a .jsonl"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), "unpack it"),
    **dict.fromkeys((".pdf", ".docx", ".epub", ".html"), "take its text out into a .txt"),
}
# Tests are repetitive and often stripped by distributions; `encodings` is tables of hexadecimal.
_STDLIB_EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "__pycache__",
}
_BLOCK = 1 << 19
"""Characters of a text, or bytes of lines, that are held at once."""
_LINES = 256


class SourceFiles(NamedTuple):
    """Files to read, sorted, and how many others of each kind lie beside them."""

    files: list[Path]
    passed_over: dict[str, int]
    media: Sequence[Path] = ()
    """Pictures, sounds and videos beside conversations, which may name them."""


def source_files(source: str, types: Sequence[str] = TEXTS) -> SourceFiles:
    """Files of a source: `python_stdlib`, a file, a folder (in it those of `types`), or a glob pattern.

    Hidden files are none of a source. Raises `SourceError` if there is none to read, or for a file named by itself
    that cannot be read as text.
    """
    path = Path(source).expanduser()
    if source == PYTHON_STDLIB:
        return SourceFiles(_standard_library(), {})
    if path.is_file():
        return SourceFiles([_allowed(_fitting(path, source, types))], {})
    if path.is_dir():
        root, found = path, [*_below(path)]
    else:
        names = sorted(glob.glob(str(path), recursive=True))
        once = {os.path.realpath(name): Path(name) for name in reversed(names) if not Path(name).is_dir()}
        root, found = Path(), [*once.values()]
    files, media, passed_over = [], [], dict[str, int]()
    for file in sorted(found):
        parts = (file.relative_to(root) if path.is_dir() else Path(file.name)).parts
        why = _not_read(file, types, by_pattern=not path.is_dir())
        if any(part.startswith(".") for part in parts):
            why = "hidden"
        if why is None:
            files.append(_allowed(file))
        elif why in _MEDIA and types == (".jsonl",):
            media.append(file)
        else:
            add(passed_over, [why])
    if not files:
        beside = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
        raise SourceError(
            f"data.source={source} names no {'conversations' if types == ('.jsonl',) else 'text'}"
            f"{f' (only {beside})' if beside else ''}; give a file, a folder or a glob of {', '.join(types)} files"
            f"{'' if types == ('.jsonl',) else f', or {PYTHON_STDLIB}'}."
        )
    return SourceFiles(files, passed_over, media)


def read_texts(files: Sequence[Path], reading: Reading) -> Iterator[tuple[str, bool]]:
    """Texts in file order, each with whether it ends its document: one of over 500,000 characters comes in blocks.

    A block ends where no token can cross, before a line break that follows a word. A text file is one document; a
    .jsonl file has one in each line, under "text".
    """
    for path in files:
        if path.suffix == ".jsonl":
            yield from ((text, True) for text in _texts_of_lines(path, reading))
            continue
        problem = _problem(path)
        if problem is None:
            yield from _blocks(path, reading)
        else:
            reading.bad(f"{path} is no text in UTF-8 ({problem})")


class Lines(NamedTuple):
    """Lines of a file, not read yet, and the number of the first of them, from one on."""

    path: Path
    first: int
    lines: list[bytes]


def lines_of(path: Path, reading: Reading) -> Iterator[Lines]:
    """The lines of a file, few enough at once, by number and by length, for what they hold to be held."""
    first, lines, size = 1, list[bytes](), 0
    with path.open("rb") as file:
        for line in file:
            reading.advance(len(line))
            lines.append(line)
            size += len(line)
            if len(lines) == _LINES or size >= _BLOCK:
                yield Lines(path, first, lines)
                first, lines, size = first + len(lines), [], 0
    if lines:
        yield Lines(path, first, lines)


def values_of(found: Lines, reading: Reading) -> Iterator[tuple[str, Any]]:
    """Place ("file:line") and value of each line of JSON; one that is none is bad."""
    for number, line in enumerate(found.lines, start=found.first):
        where = f"{found.path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            values = [json.loads(text, object_pairs_hook=_once)] if text.strip() else []
        except UnicodeDecodeError as error:
            reading.bad(f"{where} is no UTF-8 ({error.reason} at byte {error.start})")
        except json.JSONDecodeError as error:
            reading.bad(f"{where} is not JSON ({error.msg} at character {error.pos + 1})")
        except ValueError as error:  # a key twice, or a number of too many digits
            reading.bad(f"{where} is not JSON ({error})")
        except RecursionError:
            reading.bad(f"{where} is not JSON that can be read (nested too deep)")
        else:
            yield from ((where, value) for value in values)


def read_lines(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """Place and value of each line of JSON in a file."""
    for lines in lines_of(path, reading):
        yield from values_of(lines, reading)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which nothing is lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _texts_of_lines(path: Path, reading: Reading) -> Iterator[str]:
    for where, found in read_lines(path, reading):
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            reading.bad(f'{where} is no JSON object with a "text" string')
            continue
        try:
            found["text"].encode()
        except UnicodeEncodeError as error:
            reading.bad(f"{where} has half a surrogate pair at character {error.start} of its text")
            continue
        add(reading.counts.keys, (key for key in found if key != "text"))
        yield found["text"]


def _problem(path: Path) -> str | None:
    """Where a file stops to be text, if it does."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            waiting = len(decoder.getstate()[0])
            if b"\0" in block:
                return f"a zero at byte {before + block.index(0)}"
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return f"{error.reason} at byte {before - waiting + error.start}"
            before += len(block)
    return "cut off in a character" if decoder.getstate()[0] else None


def _blocks(path: Path, reading: Reading) -> Iterator[tuple[str, bool]]:
    with path.open(encoding="utf-8-sig") as file:
        held, blank = "", True
        while piece := file.read(_BLOCK):
            reading.advance(len(piece.encode()))
            held += piece
            blank = blank and not held.strip()
            cut = _safe_cut(held) if len(held) >= _BLOCK else 0
            if cut and not blank:
                yield held[:cut], False
                held = held[cut:]
        if not blank:
            yield held, True


def _safe_cut(text: str) -> int:
    """The last place before a line break that follows a word, else before a blank that does; 0 if there is none."""
    for mark in ("\n", " "):
        place = text.rfind(mark)
        while place > 0 and text[place - 1].isspace():
            place = text.rfind(mark, 0, place)
        if place > 0:
            return place
    return 0


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix in TEXTS
        and path.suffix != ".jsonl"
        and not _STDLIB_EXCLUDED.intersection(path.relative_to(root).parts)
        and path.is_file()
    )


def _below(folder: Path) -> Iterator[Path]:
    """Whatever lies in a folder and in those below it, linked ones too, each folder once."""

    def failed(error: OSError) -> None:
        raise unreadable(error.filename, error.strerror)

    seen = set[str]()
    for place, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in names)


def _allowed(file: Path) -> Path:
    """The file itself. Raises `SourceError` if this user may not read it."""
    if not os.access(file, os.R_OK):
        raise unreadable(file, os.strerror(errno.EACCES))
    return file


def _fitting(path: Path, source: str, types: Sequence[str]) -> Path:
    """The file itself; any text may be named by itself, whatever its type."""
    kind = path.suffix.lower()
    if types == (".jsonl",) and kind != ".jsonl":
        how = _CONVERT.get(kind, 'write conversations as lines of {"messages": [...]} into a .jsonl')
        raise SourceError(f"data.source={source} names no conversations: only .jsonl is read; {how}.")
    if kind in _CONVERT or kind in _MEDIA:
        how = _CONVERT.get(kind, "name it in a conversation, with data.format=chat")
        raise SourceError(f"data.source={source} is a {kind} file, which is not read as text; {how}.")
    return path


def _not_read(path: Path, types: Sequence[str], by_pattern: bool) -> str | None:
    """Why a file of a folder, or one that a pattern names, is passed over. Conversations may use the media."""
    if not path.is_file():
        return "broken links" if path.is_symlink() else "neither files nor folders"
    kind = path.suffix.lower()
    named = by_pattern and types == TEXTS and kind not in _CONVERT and kind not in _MEDIA
    if kind not in types and not named:
        return kind or "without a suffix"
    return "empty" if path.stat().st_size == 0 else None
