"""Tokenised documents on disk: one flat file of ids, memory-mapped, and the offsets of its documents.

A document that is not plain text has a line of JSON beside it: what of it the model learns to write, and its media.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data.corpus.counts import Counts
from data.corpus.digests import Digests
from data.media.files import MediaFile
from data.media.kept import placed
from model.errors import UserError

Ids: TypeAlias = Sequence[int] | NDArray[np.int64]

META, TOKENS, _OFFSETS, _HASHES = "meta.json", "tokens.bin", "offsets.npy", "hashes.npy"
_DETAILS, _ENDS, _SOFT_TOKENS = "details.jsonl", "details.npy", "soft_tokens.npy"
_SIZES = ("documents", "tokens", "details", "soft_tokens")
_MOST_OPEN = 128
"""Shards whose files are open at once."""


class ShardError(UserError):
    """A damaged corpus, or one that cannot be packed as asked."""


@dataclass(frozen=True)
class Document:
    """A tokenised text or conversation."""

    ids: Ids
    supervised: Sequence[Sequence[int]]
    """Start and stop of each run of tokens that the model learns to write: these very tokens, not shifted."""
    media: list[MediaFile] = field(default_factory=list)
    """In the order of their tokens."""

    goes_on: bool = False
    """Whether the next one is more of the same text."""
    content_hash: int = 0
    """What `data.corpus.held_out` makes of its contents; of a text that goes on, its last part has it."""

    @classmethod
    def text(cls, ids: Ids, *, goes_on: bool = False, content_hash: int = 0) -> Document:
        """Plain text, of which all but the first token is learned."""
        return cls(ids, [[1, len(ids)]], goes_on=goes_on, content_hash=content_hash)

    @property
    def is_text(self) -> bool:
        """Whether it is all learned, but for its first token, and has no media."""
        return not self.media and [*map(list, self.supervised)] == [[1, len(self.ids)]]


@dataclass(frozen=True)
class Shard:
    """What was written of a part of a source: documents, tokens, bytes of details, soft tokens, and checksums."""

    documents: int
    tokens: int
    details: int
    soft_tokens: int
    sha256: dict[str, str]


def write_shard(folder: Path, documents: Iterable[Document], vocab_size: int) -> Shard:
    """Write a shard to an existing folder, ids in two bytes where the vocabulary allows.

    Only one document is held at a time, or a part of one that goes on, and three numbers of each.
    """
    dtype, length = dtype_of(vocab_size), 0
    offsets, ends, hashes, soft_tokens = array("q", [0]), array("q", [0]), array("Q"), array("q")
    with (folder / TOKENS).open("wb") as tokens, (folder / _DETAILS).open("wb") as details:
        for document in documents:
            tokens.write(np.asarray(document.ids, dtype=dtype).tobytes())
            length += len(document.ids)
            if document.goes_on:
                continue
            offsets.append(length)
            hashes.append(document.content_hash)
            soft_tokens.append(sum(file.num_tokens for file in document.media))
            line = {"supervised": document.supervised, "media": [asdict(file) for file in document.media]}
            ends.append(ends[-1] + (0 if document.is_text else details.write(json.dumps(line).encode() + b"\n")))
    np.save(folder / _OFFSETS, np.asarray(offsets, dtype=np.int64))
    np.save(folder / _HASHES, np.asarray(hashes, dtype=np.uint64))
    if any(soft_tokens):
        np.save(folder / _SOFT_TOKENS, np.asarray(soft_tokens, dtype=np.int64))
    if ends[-1]:
        np.save(folder / _ENDS, np.asarray(ends, dtype=np.int64))
    else:
        (folder / _DETAILS).unlink()
    return Shard(len(hashes), length, ends[-1], sum(soft_tokens), checksums(folder))


def write_index(folder: Path, parts: Sequence[tuple[Shard, Counts]], vocab_size: int, counts: Counts) -> None:
    """Make a corpus of the shards in a folder: its index has their sizes, counts and checksums, and the whole's."""
    written = [{name: getattr(part, name) for name in _SIZES} | {"counts": asdict(its)} for part, its in parts]
    meta: dict[str, Any] = {"dtype": dtype_of(vocab_size).name, "vocab_size": vocab_size, "counts": asdict(counts)}
    meta |= {key: sum(getattr(part, key) for part, _ in parts) for key in ("documents", "tokens")}
    sha256 = checksums(folder)
    for number, (part, _) in enumerate(parts):
        sha256 |= {f"{part_name(number)}/{name}": digest for name, digest in part.sha256.items()}
    (folder / META).write_text(json.dumps(meta | {"parts": written, "sha256": sha256}))


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def part_name(number: int) -> str:
    """The folder of a shard in that of its corpus."""
    return f"{number:05d}"


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder that is not hidden."""
    return {file.name: _sha256(file) for file in sorted(folder.glob("[!.]*")) if file.is_file()}


class _Opened(NamedTuple):
    """Tokens and details of a shard, mapped from disk."""

    tokens: NDArray[Any]
    details: NDArray[np.uint8]


class Shards:
    """Read access to a corpus. Raises `ShardError` if files are missing, damaged, or not what was written.

    roots: folders in which relative paths of media begin, in the order of the files that named them; digests: of the
    files' contents, where they are to be compared with what was written. Three numbers of each document are held, and
    files of few shards are open at once.
    """

    def __init__(self, folder: Path, roots: Sequence[Path] = (), digests: Digests | None = None) -> None:
        self.folder, self.roots = folder, roots
        self._opened: dict[int, _Opened] = {}
        try:
            meta: dict[str, Any] = json.loads((folder / META).read_text())
            if digests is not None:
                self._compare(meta["sha256"], digests)
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype {meta['dtype']!r}")
            self._dtype = np.dtype(meta["dtype"])
            self.vocab_size = int(meta["vocab_size"])
            self.counts = Counts.read(meta["counts"])
            self.digest = hashlib.sha256(json.dumps(meta["sha256"], sort_keys=True).encode()).hexdigest()[:20]
            self._parts = [Shard(**{name: part[name] for name in _SIZES}, sha256={}) for part in meta["parts"]]
            self._offsets, self._ends, hashes = list[NDArray[np.int64]](), list[NDArray[np.int64]](), []
            soft_tokens = [np.zeros(0, np.int64)]
            for number, part in enumerate(self._parts):
                self._check_sizes(number, part)
                self._offsets.append(np.load(self._path(number, _OFFSETS)))
                hashes.append(np.load(self._path(number, _HASHES)))
                ends = np.load(self._path(number, _ENDS)) if part.details else np.zeros(part.documents + 1, np.int64)
                self._ends.append(ends)
                no_media = np.zeros(part.documents, np.int64)
                soft_tokens.append(np.load(self._path(number, _SOFT_TOKENS)) if part.soft_tokens else no_media)
                if not part.documents == len(hashes[-1]) == len(self._offsets[-1]) - 1 == len(ends) - 1:
                    raise self._damaged(f"has not the {part.documents} documents that its {META} says")
                if len(soft_tokens[-1]) != part.documents or soft_tokens[-1].sum() != part.soft_tokens:
                    raise self._damaged(f"has not the {part.soft_tokens} soft tokens that its {META} says")
                if self._offsets[-1][-1] != part.tokens or ends[-1] != part.details:
                    raise self._damaged(f"has not the {part.tokens} tokens that its {META} says")
            self.hashes: NDArray[np.uint64] = np.concatenate([np.zeros(0, np.uint64), *hashes])
            """64 bits of each document's contents."""
            self.soft_tokens: NDArray[np.int64] = np.concatenate(soft_tokens)
            """Tokens of each document that stand for media."""
            self._first = np.cumsum([0, *(part.documents for part in self._parts)])
            same = (meta["documents"], meta["tokens"]) == (self.num_documents, self.num_tokens)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._damaged(f"cannot be read ({error})") from None
        if not same:
            raise self._damaged(f"has {self.num_tokens} tokens where its {META} says {meta['tokens']}")

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker that is not forked opens the files itself, rather than get all tokens."""
        return Shards, (self.folder, self.roots)

    def _path(self, number: int, name: str) -> Path:
        return self.folder / part_name(number) / name

    def _check_sizes(self, number: int, part: Shard) -> None:
        for name, size in ((TOKENS, part.tokens * self._dtype.itemsize), (_DETAILS, part.details)):
            if size and self._path(number, name).stat().st_size != size:
                raise self._damaged(f"has a {part_name(number)}/{name} of another size than was written")

    def _compare(self, written: dict[str, str], digests: Digests) -> None:
        for name, digest in written.items():
            if digests.of(self.folder / name) != digest:
                raise self._damaged(f"is not what was written ({name} has another checksum)")

    def _damaged(self, how: str) -> ShardError:
        return ShardError(f"corpus {self.folder} {how}; delete the folder to prepare it again.")

    @property
    def num_documents(self) -> int:
        """How many documents the corpus holds."""
        return len(self.hashes)

    @property
    def num_tokens(self) -> int:
        """How many tokens the corpus holds."""
        return sum(part.tokens for part in self._parts)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.concatenate([np.zeros(0, np.int64), *map(np.diff, self._offsets)])

    def document(self, index: int, start: int = 0, stop: int | None = None) -> Document:
        """A document of which only tokens [start, stop) are read; what is supervised still counts from its start."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        opened, index = self._open(number), index - int(self._first[number])
        first, end = (int(offset) for offset in self._offsets[number][index : index + 2])
        ids = opened.tokens[first + start : end if stop is None else min(first + stop, end)].astype(np.int64)
        line = bytes(opened.details[self._ends[number][index] : self._ends[number][index + 1]])
        if not line:
            return Document(ids, [[1, end - first]])
        details: dict[str, Any] = json.loads(line)
        return Document(ids, details["supervised"], [self._placed(MediaFile(**file)) for file in details["media"]])

    def _open(self, number: int) -> _Opened:
        """The files of a shard, which take a descriptor each; the one that was opened first is closed for it."""
        if number not in self._opened:
            while len(self._opened) >= _MOST_OPEN:
                del self._opened[next(iter(self._opened))]
            part, no_details = self._parts[number], np.zeros(0, np.uint8)
            tokens: NDArray[Any] = np.zeros(0, self._dtype)
            if part.tokens:
                tokens = np.memmap(self._path(number, TOKENS), dtype=self._dtype, mode="r")
            details = np.memmap(self._path(number, _DETAILS), np.uint8, "r") if part.details else no_details
            self._opened[number] = _Opened(tokens, details)
        return self._opened[number]

    def _placed(self, file: MediaFile) -> MediaFile:
        root = self.roots[file.root] if self.roots else Path()
        return replace(file, path=str(placed(file.path, root, self.folder)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
