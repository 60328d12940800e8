"""Tokenise a source once and keep the result.

A prepared corpus is a folder `tokenizer.json, meta.json` with a shard for each part of the source, `00000/tokens.bin,
offsets.npy, hashes.npy`, for conversations also `details.jsonl, details.npy`, and `media` for files that lay inside of
others. It is named by a digest of everything it was made from, written aside and moved into place whole; shards that
were finished before a process was killed are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from data.chat.documents import ChatFormat
from data.containers.records import container_of
from data.corpus.counts import Counts
from data.corpus.digests import Digests
from data.corpus.making import made_once
from data.corpus.packing import Packing
from data.corpus.parts import PART_BYTES, Part, cut
from data.corpus.progress import Progress
from data.corpus.reading import Reading, SourceError, go_on, unreadable
from data.corpus.report import write_report
from data.corpus.shards import Shard, Shards, checksums, part_name, write_index, write_shard
from data.corpus.sources import SourceFiles
from data.corpus.text import TextFormat
from data.tokenizer import load_tokenizer, use_all_processors
from data.workers import in_order, processors

log = logging.getLogger("gemwright")

_VERSION = 4
"""Goes up when the same files get other tokens, so that nothing stale is read from a cache."""
_NOTES = ".found.json"
_FEW_BYTES = 1 << 21
"""Not worth other processes."""

Format: TypeAlias = TextFormat | ChatFormat


@dataclass(frozen=True)
class Policy:
    """What becomes of what cannot be read or used.

    on_bad: refuse or skip; strict: whether what is read without being used is an error; check_stop: raises `UserError`
    when told to stop; verify: whether files are compared with their checksums; workers: processes that
    prepare, 0 for one on each processor.
    """

    on_bad: str = "refuse"
    strict: bool = False
    check_stop: Callable[[], None] = go_on
    verify: bool = True
    workers: int = 0


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, their tokenizer, how they are packed into sequences, and what they are called.

    max_media_tokens: most soft tokens of media in a sequence.
    """

    folder: Path
    shard: Shards
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

    Safe to call from several processes at once: one makes them, and the others wait for it. Raises
    `UserError`, with file and line where there is one, for what cannot be read or used, and when nothing remains.
    """
    policy = policy or Policy()
    found, corpora = format.files(source), (cache or default_cache()) / "corpora"
    digests = Digests(corpora)
    folder = corpora / _name(format, found, digests)
    made_once(folder, lambda aside: _make(aside, source, found, format, policy), policy.check_stop)
    roots = [path.parent.absolute() for path in found.files]
    shard = Shards(folder, roots, digests if policy.verify else None)
    twice = len(found.files) - len({digests.of(path) for path in found.files})
    shard.counts = replace(shard.counts, files=shard.counts.files | found.passed_over, twice=twice)
    digests.save()
    if shard.counts.shapes:
        log.info("%s: %s", source, shard.counts.lines())
    _check_counts(source, shard.counts, policy)
    tokenizer = load_tokenizer(folder)
    format.check(tokenizer)
    return Corpus(folder, shard, tokenizer, format.packing, format.noun, format.max_media_tokens)


def _make(folder: Path, source: str, found: SourceFiles, format: Format, policy: Policy) -> None:
    """Fill a folder, in which parts may be that were prepared before."""
    use_all_processors()
    tokenizer = _tokenizer(folder / "tokenizer.json", found, format, policy)
    parts, paths = cut(found.files), [str(path.absolute()) for path in found.files]
    work = _Prepare(folder, format, tokenizer, found.files, paths, Progress(0))
    kept = {number for number, part in enumerate(parts) if work.has(number, part)}
    if kept:
        log.info("%d of %d parts of %s were prepared before and are kept", len(kept), len(parts), source)
    left = [(number, part) for number, part in enumerate(parts) if number not in kept]
    _prepare_parts(work, left, policy)
    reading = Reading(found.files, policy.on_bad, policy.check_stop)
    written = []
    for number in range(len(parts)):
        its, notes = work.written(number)
        reading.add_found(notes)
        written.append((its, Counts.read(notes["counts"])))
    unnamed = {path.resolve() for path in found.media} - reading.media
    if unnamed:
        reading.counts.files["media that no line names"] = len(unnamed)
    reading.finish()
    if not reading.counts.kept:
        raise SourceError(
            f"data.source={source} leaves nothing to train on ({str(reading.counts) or 'it is empty'}); {format.fix}."
        )
    write_index(folder, written, tokenizer.get_vocab_size(), reading.counts)
    write_report(Shards(folder), sum(path.stat().st_size for path in found.files))
    for note in folder.glob(f"*/{_NOTES}"):
        note.unlink()


def _prepare_parts(work: _Prepare, parts: Sequence[tuple[int, Part]], policy: Policy) -> None:
    """Make shards of parts, by other processes where there are several."""
    workers = min(policy.workers or processors(), len(parts))
    work.progress = progress = Progress(sum(part.size for _, part in parts), shared=workers > 1)
    if workers > 1:
        work.check_stop = progress.check_stop
        log.info("%d processes prepare %d parts", workers, len(parts))
    else:
        work.check_stop, work.workers = policy.check_stop, policy.workers or processors()

    def check_stop() -> None:
        policy.check_stop()
        progress.tell()

    for _ in in_order(work, parts, check_stop, workers, progress.stop):
        pass


def _tokenizer(file: Path, found: SourceFiles, format: Format, policy: Policy) -> Tokenizer:
    """The tokenizer in this file, which is made if it is missing."""
    if file.exists():
        return load_tokenizer(file)
    size = sum(path.stat().st_size for path in found.files)
    reading = Reading(found.files, policy.on_bad, policy.check_stop, progress=Progress(size))
    tokenizer = format.make_tokenizer(reading)
    format.check(tokenizer)
    aside = file.with_name(".tokenizer.json")
    tokenizer.save(str(aside))
    aside.rename(file)
    return tokenizer


@dataclass
class _Prepare:
    """Makes a shard of a part of a source, in any process."""

    folder: Path
    format: Format
    tokenizer: Tokenizer
    files: list[Path]
    paths: list[str]
    progress: Progress
    check_stop: Callable[[], None] = go_on
    workers: int = 1

    def __call__(self, item: tuple[int, Part]) -> None:
        """Write the shard, with notes of what was found, and give it its name once it is whole."""
        number, part = item
        aside = self.folder / f".{part_name(number)}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        many = self.workers if part.size > _FEW_BYTES else 1
        files, first, span = self.files[part.first : part.stop], part.first, part.span
        reading = Reading(
            files, "skip", self.check_stop, Counts(), set(), self.folder, first, span, many, self.progress
        )
        documents = self.progress.counting(self.format.documents(self.tokenizer, reading))
        written = write_shard(aside, documents, self.tokenizer.get_vocab_size())
        notes = {"of": self._of(part), "written": asdict(written), **reading.found()}
        (aside / _NOTES).write_text(json.dumps(notes))
        aside.rename(self.folder / part_name(number))

    def has(self, number: int, part: Part) -> bool:
        """Whether a part is there, whole and of these files; what else has its name is removed."""
        folder = self.folder / part_name(number)
        try:
            written, notes = self.written(number)
            if notes["of"] == self._of(part) and written.sha256 == checksums(folder):
                return True
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return False

    def written(self, number: int) -> tuple[Shard, dict[str, Any]]:
        """What was written of a part, and what was found in it."""
        notes: dict[str, Any] = json.loads((self.folder / part_name(number) / _NOTES).read_text())
        return Shard(**notes["written"]), notes

    def _of(self, part: Part) -> list[Any]:
        """What tells a part from another; it is named where it lies, since what was found has names of files."""
        return [part.first, self.paths[part.first : part.stop], part.span and [*part.span]]


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
    parts = [f"{_VERSION}/{PART_BYTES}", format.noun, format.settings()]
    try:
        parts += [digests.of(path) for path in ([tokenizer] if tokenizer and tokenizer.is_file() else [])]
        parts += [f"{container_of(path)} {digests.of(path)}" for path in found.files]
    except OSError as error:
        raise unreadable(error.filename, error.strerror) from None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
