"""Where documents come from: the corpus every Python brings along, or files named by the user."""

from __future__ import annotations

import codecs
import errno
import glob
import io
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.containers.opened import DamagedError, kind_of, opened
from data.containers.records import RECORDS, holds_records, must_be_unpacked, records_of
from data.corpus.counts import add
from data.corpus.hub import HUB, check_splits, fetched, is_description
from data.corpus.reading import Reading, SourceError, unreadable

PYTHON_STDLIB = "python_stdlib"
_TEXT, _PROSE, _SETTINGS = ".txt", (".md", ".rst", ".py"), (".json",)
TEXTS = (_TEXT, *_PROSE, *RECORDS)
"""Types of file that are read, each of them one text or many records. In a dataset, prose is about it."""
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
    ".xlsx": "save its sheet as .csv",
    **dict.fromkeys((".zip", ".tgz", ".7z"), "unpack it"),
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
"""Characters of a text that are held at once."""


class SourceFiles(NamedTuple):
    """Files to read, sorted, and how many others of each kind lie beside them."""

    files: list[Path]
    passed_over: dict[str, int]
    media: Sequence[Path] = ()
    """Pictures, sounds and videos beside conversations, which may name them."""


def source_files(source: str, types: Sequence[str] = TEXTS) -> SourceFiles:
    """Files of a source: `python_stdlib`, a file, a folder (in it those of `types`), a glob pattern, or these in a
    dataset of the hub.

    Hidden files are none of a source, and .json only when named by itself or a pattern: in folders it holds settings.
    Raises `SourceError` if there is none to read, or for a file named by itself that cannot be read as text.
    """
    if source == PYTHON_STDLIB:
        return SourceFiles(_standard_library(), {})
    if source.startswith(HUB):
        types = tuple(kind for kind in types if kind not in _PROSE)
        folder, path = fetched(source, types)
        found = _found(path, source, types)
        check_splits(source, folder, found.files)
        return SourceFiles(found.files, {})
    path = Path(source).expanduser()
    found = _found(path, source, types)
    if (path / "dataset_dict.json").is_file():
        check_splits(source, path, found.files)
    return found


def _found(path: Path, source: str, types: Sequence[str]) -> SourceFiles:
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
        if is_description(file):
            continue
        if why is None:
            files.append(_allowed(file))
        elif why in _MEDIA and _TEXT not in types:
            media.append(file)
        else:
            add(passed_over, [why])
    if not files:
        beside = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
        raise SourceError(
            f"data.source={source} names no {'text' if _TEXT in types else 'conversations'}"
            f"{f' (only {beside})' if beside else ''}; give a file, a folder or a glob of {', '.join(types)} files "
            f"(.json by its name or a glob){f', or {PYTHON_STDLIB}' if _TEXT in types else ''}."
        )
    return SourceFiles(files, passed_over, media)


def read_texts(files: Sequence[Path], reading: Reading) -> Iterator[tuple[str, bool]]:
    """Texts in file order, each with whether it ends its document: one of over 500,000 characters comes in blocks.

    A block ends where no token can cross, before a line break that follows a word. A text file is one document; a
    file of records has one in each, under "text".
    """
    for path in files:
        if holds_records(path):
            yield from ((text, True) for text in _texts_of_records(path, reading))
            continue
        problem = _problem(path)
        if problem is None:
            yield from _blocks(path, reading)
        else:
            reading.bad(f"{path} {problem}")


def _texts_of_records(path: Path, reading: Reading) -> Iterator[str]:
    for batch in records_of(path, reading):
        if batch.columns is not None and "text" not in batch.columns:
            reading.bad(f'{path} has no column "text" among {", ".join(map(ascii, batch.columns))}')
            return
        for where, found in batch.values(reading):
            if not isinstance(found, dict) or not isinstance(found.get("text"), str):
                reading.bad(f'{where} has no "text" string')
                continue
            try:
                found["text"].encode()
            except UnicodeEncodeError as error:
                reading.bad(f"{where} has half a surrogate pair at character {error.start} of its text")
                continue
            add(reading.counts.keys, (key for key in found if key != "text"))
            yield found["text"]


def _problem(path: Path) -> str | None:
    """Why a file is no text, and where it stops to be one."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with opened(path) as file:
            while block := file.read(_BLOCK):
                waiting = len(decoder.getstate()[0])
                if b"\0" in block:
                    return f"is no text in UTF-8 (a zero at byte {before + block.index(0)})"
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    return f"is no text in UTF-8 ({error.reason} at byte {before - waiting + error.start})"
                before += len(block)
    except DamagedError as error:
        return f"cannot be unpacked ({error})"
    return "is no text in UTF-8 (cut off in a character)" if decoder.getstate()[0] else None


def _blocks(path: Path, reading: Reading) -> Iterator[tuple[str, bool]]:
    with io.TextIOWrapper(opened(path, reading.advance), encoding="utf-8-sig") as file:
        held, blank = "", True
        while piece := file.read(_BLOCK):
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
        and not holds_records(path)
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
    kind = kind_of(path)
    if must_be_unpacked(path):
        raise SourceError(f"data.source={source} is a {kind} file that is compressed as a whole; unpack it.")
    if _TEXT not in types and kind not in types:
        how = _CONVERT.get(kind, 'write conversations as lines of {"messages": [...]} into a .jsonl')
        raise SourceError(f"data.source={source} names no conversations: only {', '.join(RECORDS)} are read; {how}.")
    if kind in _CONVERT or kind in _MEDIA:
        how = _CONVERT.get(kind, "name it in a conversation, with data.format=chat")
        raise SourceError(f"data.source={source} is a {kind} file, which is not read as text; {how}.")
    return path


def _not_read(path: Path, types: Sequence[str], by_pattern: bool) -> str | None:
    """Why a file of a folder, or one that a pattern names, is passed over. Conversations may use the media."""
    if not path.is_file():
        return "broken links" if path.is_symlink() else "neither files nor folders"
    kind = kind_of(path)
    if must_be_unpacked(path) or (kind in _SETTINGS and not by_pattern):
        return "".join(path.suffixes[-2:]).lower()
    named = by_pattern and _TEXT in types and kind not in _CONVERT and kind not in _MEDIA
    if kind not in types and not named:
        return kind or path.suffix.lower() or "without a suffix"
    return "empty" if path.stat().st_size == 0 else None
