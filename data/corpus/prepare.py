"""Tokenise a source once and keep the result.

A prepared corpus is a folder `tokenizer.json, tokens.bin, offsets.npy, hashes.npy, meta.json`, for conversations also
`details.jsonl, details.npy`, and `media` for files that lay inside of others. It is named by a digest of everything it
was made from, written aside and moved into place whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO, TypeAlias

from tokenizers import Tokenizer

from data.chat.documents import ChatFormat
from data.containers.records import container_of
from data.corpus.counts import Counts
from data.corpus.digests import Digests
from data.corpus.packing import Packing
from data.corpus.reading import Reading, SourceError, go_on, unreadable
from data.corpus.shards import Document, Shard, write_shard
from data.corpus.sources import SourceFiles
from data.corpus.text import TextFormat
from data.tokenizer import load_tokenizer, use_all_processors

log = logging.getLogger("gemwright")

_VERSION = 3
"""Goes up when the same files get other tokens, so that nothing stale is read from a cache."""
_MAKING, _LOCK = ".making-", ".lock"

Format: TypeAlias = TextFormat | ChatFormat


@dataclass(frozen=True)
class Policy:
    """What becomes of what cannot be read or used.

    on_bad: refuse or skip; strict: whether what is read without being used is an error; check_stop: raises `UserError`
    when told to stop; verify: whether files are compared with their checksums.
    """

    on_bad: str = "refuse"
    strict: bool = False
    check_stop: Callable[[], None] = go_on
    verify: bool = True


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, their tokenizer, how they are packed into sequences, and what they are called.

    max_media_tokens: most soft tokens of media in a sequence.
    """

    folder: Path
    shard: Shard
    tokenizer: Tokenizer
    packing: type[Packing]
    noun: str = "documents"
    max_media_tokens: int | None = None


def default_cache() -> Path:
    """The user's cache folder, in which prepared sources are kept. Raises `SourceError` where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemwright"
    except RuntimeError:
        raise SourceError("there is no home folder to keep prepared data in; set data.cache to a folder.") from None


def prepare(source: str, format: Format, cache: Path | None = None, policy: Policy | None = None) -> Corpus:
    """The tokenised documents of a source, from the cache or made now; the same for the same bytes, wherever they lie.

    Safe to call from several processes at once: the first to finish wins, the others take its result. Raises
    `UserError`, with file and line where there is one, for what cannot be read or used, and when nothing remains.
    """
    policy = policy or Policy()
    found, corpora = format.files(source), (cache or default_cache()) / "corpora"
    digests = Digests(corpora)
    folder = corpora / _name(format, found, digests)
    made_once(folder, lambda aside: _make(aside, source, found, format, policy))
    roots = [path.parent.absolute() for path in found.files]
    shard = Shard(folder, roots, digests if policy.verify else None)
    twice = len(found.files) - len({digests.of(path) for path in found.files})
    shard.counts = replace(shard.counts, files=shard.counts.files | found.passed_over, twice=twice)
    digests.save()
    if shard.counts.shapes:
        log.info("%s: %s", source, shard.counts.lines())
    _check_counts(source, shard.counts, policy)
    tokenizer = load_tokenizer(folder)
    format.check(tokenizer)
    return Corpus(folder, shard, tokenizer, format.packing, format.noun, format.max_media_tokens)


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Unless `folder` is there, have `make` fill an empty folder aside and move it into place whole.

    What a killed process left aside is cleared away. Raises `SourceError` if nothing can be written there.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear(folder.parent)
        aside, lock = _aside(folder.parent)
    except OSError as error:
        raise SourceError(
            f"prepared data cannot be kept in {folder.parent} ({error.strerror}); set data.cache to a folder that can "
            "be written to."
        ) from None
    with lock:
        try:
            make(aside)
            (aside / _LOCK).unlink()
            aside.chmod(0o755)  # others may share the cache; temporary folders are private
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _aside(parent: Path) -> tuple[Path, TextIO]:
    """An empty folder, and the lock in it by which others know that its maker lives."""
    while True:
        aside = Path(tempfile.mkdtemp(dir=parent, prefix=_MAKING))
        lock = (aside / _LOCK).open("w")
        _is_free(lock.fileno())
        if (aside / _LOCK).exists():  # else another process took it for left behind, before it was locked
            return aside, lock
        lock.close()


def _clear(parent: Path) -> None:
    """Remove folders that were being made, by a lock file in them ours, and whose makers are gone."""
    for lock in parent.glob(f"{_MAKING}*/{_LOCK}"):
        try:
            with lock.open("r+") as held:
                if _is_free(held.fileno()):
                    shutil.rmtree(lock.parent)
        except OSError as error:
            log.warning("%s was left by a killed process and cannot be cleared away (%s)", lock.parent, error.strerror)


def _is_free(descriptor: int) -> bool:
    """Whether no other process holds the lock of a file, which this one then does; no on a file system without any."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _make(folder: Path, source: str, found: SourceFiles, format: Format, policy: Policy) -> None:
    use_all_processors()
    tokenizer = format.make_tokenizer(Reading(found.files, policy.on_bad, policy.check_stop))
    format.check(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    reading = Reading(found.files, policy.on_bad, policy.check_stop, corpus=folder)
    documents = _counted(format.documents(tokenizer, reading), found, reading)
    write_shard(folder, documents, tokenizer.get_vocab_size(), reading.counts)
    if not reading.counts.kept:
        raise SourceError(
            f"data.source={source} leaves nothing to train on ({str(reading.counts) or 'it is empty'}); {format.fix}."
        )


def _counted(documents: Iterator[Document], found: SourceFiles, reading: Reading) -> Iterator[Document]:
    """The documents; when all are read, media of the source that no line names are counted."""
    yield from documents
    unnamed = {path.resolve() for path in found.media} - reading.media
    if unnamed:
        reading.counts.files["media that no line names"] = len(unnamed)


def _check_counts(source: str, counts: Counts, policy: Policy) -> None:
    """What was left out when the corpus was made may be refused now."""
    if policy.on_bad == "refuse" and counts.bad:
        raise SourceError(
            f"data.source={source} has {counts.bad} bad lines or files, left out when it was prepared; mend or drop "
            "them, or set data.on_bad=skip."
        )
    ignored = counts.ignored()
    if ignored and policy.strict:
        raise SourceError(
            f"data.source={source} holds what nothing reads ({ignored}); drop it, or set data.strict=false."
        )
    if ignored:
        log.warning("%s holds what nothing reads: %s", source, ignored)


def _name(format: Format, found: SourceFiles, digests: Digests) -> str:
    """Name of a corpus made from the contents of these files by these settings."""
    tokenizer = format.tokenizer
    if tokenizer is not None and tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.json"
    parts = [str(_VERSION), format.noun, format.settings()]
    try:
        parts += [digests.of(path) for path in ([tokenizer] if tokenizer and tokenizer.is_file() else [])]
        parts += [f"{container_of(path)} {digests.of(path)}" for path in found.files]
    except OSError as error:
        raise unreadable(error.filename, error.strerror) from None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
