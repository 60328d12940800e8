"""Tokenise a source once and keep the result.

A prepared corpus is a folder `tokenizer.json, tokens.bin, offsets.npy, meta.json`, for conversations also
`details.jsonl, details.npy`. It is named by a digest of everything it was made from, written aside and moved into
place whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tokenizers import Tokenizer

from data.chat.documents import ChatFormat
from data.corpus.packing import Packing
from data.corpus.shards import Counts, Shard, write_shard
from data.corpus.sources import PYTHON_STDLIB, SourceError
from data.corpus.text import TextFormat
from data.tokenizer import load_tokenizer

_VERSION = 1
"""Goes up when the same files get other tokens, so that nothing stale is read from a cache."""

Format: TypeAlias = TextFormat | ChatFormat


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, their tokenizer, and how they are packed into sequences."""

    folder: Path
    shard: Shard
    tokenizer: Tokenizer
    packing: type[Packing]


def default_cache() -> Path:
    """The user's cache folder, in which prepared sources and their tokenizers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gemwright"


def prepare(source: str, format: Format, cache: Path | None = None) -> Corpus:
    """The tokenised documents of a source, from the cache or made now.

    Safe to call from several processes at once: the first to finish wins, the others take its result. Raises
    `UserError`, with file and line where there is one, for what cannot be read or used, and when nothing remains.
    """
    files = format.files(source)
    settings = f"{_VERSION}/{format.settings(files)}"
    name = _digest(settings, format.tokenizer, files, by_content=source == PYTHON_STDLIB)
    folder = (cache or default_cache()) / "corpora" / name
    made_once(folder, lambda aside: _make(aside, source, files, format))
    tokenizer = load_tokenizer(folder)
    format.check(tokenizer)
    return Corpus(folder, Shard(folder), tokenizer, format.packing)


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Unless `folder` is there, have `make` fill an empty folder aside and move it into place whole."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        make(aside)
        aside.chmod(0o755)  # others may share the cache; temporary folders are private
        aside.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make(folder: Path, source: str, files: list[Path], format: Format) -> None:
    tokenizer, counts = format.make_tokenizer(files), Counts()
    format.check(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_shard(folder, format.documents(files, tokenizer, counts), tokenizer.get_vocab_size(), counts)
    if not counts.kept:
        raise SourceError(f"data.source={source} leaves nothing to train on ({counts}); {format.fix}.")


def _digest(settings: str, tokenizer: Path | None, files: list[Path], by_content: bool) -> str:
    """Name of a corpus made from all this; files are known by place, size and date unless `by_content`.

    Python's library is small and each node has its own copy, so that one is known by content.
    """
    digest = hashlib.sha256(settings.encode())
    if tokenizer is not None:
        path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in files:
        if by_content:
            digest.update(path.read_bytes())
            continue
        status = path.stat()
        digest.update(f"{path.resolve()}/{status.st_size}/{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]
