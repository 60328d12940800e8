"""Tokenised documents on disk: one flat file of ids, memory-mapped, and the offsets of its documents.

A document that is not plain text has a line of JSON beside it: what of it the model learns to write, and its media.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

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


def write_shard(folder: Path, documents: Iterable[Document], vocab_size: int, counts: Counts) -> None:
    """Write to an existing folder, ids in two bytes where the vocabulary allows.

    Only one document is held at a time, or a part of one that goes on; `counts` is read when all are written.
    """
    dtype, offsets, ends, length = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32), [0], [0], 0
    hashes: list[int] = []
    soft_tokens: list[int] = []
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
    meta = {"dtype": dtype.name, "documents": len(offsets) - 1, "tokens": offsets[-1], "vocab_size": vocab_size}
    meta |= {"details": ends[-1], "soft_tokens": any(soft_tokens), "counts": asdict(counts)}
    meta["sha256"] = {file.name: _sha256(file) for file in sorted(folder.glob("[!.]*")) if file.is_file()}
    (folder / META).write_text(json.dumps(meta))


class Shard:
    """Read access to written documents. Raises `ShardError` if files are missing, damaged, or not what was written.

    roots: folders in which relative paths of media begin, in the order of the files that named them; digests: of the
    files' contents, where they are to be compared with what was written.
    """

    def __init__(self, folder: Path, roots: Sequence[Path] = (), digests: Digests | None = None) -> None:
        self.folder, self.roots = folder, roots
        try:
            meta: dict[str, Any] = json.loads((folder / META).read_text())
            if digests is not None:
                self._compare(meta["sha256"], digests)
            self.offsets: NDArray[np.int64] = np.load(folder / _OFFSETS)
            self.hashes: NDArray[np.uint64] = np.load(folder / _HASHES)
            """64 bits of each document's contents."""
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype {meta['dtype']!r}")
            self.tokens = np.memmap(folder / TOKENS, dtype=meta["dtype"], mode="r")
            self.vocab_size = int(meta["vocab_size"])
            self.counts = Counts.read(meta["counts"])
            self.digest = hashlib.sha256(json.dumps(meta["sha256"], sort_keys=True).encode()).hexdigest()[:20]
            self.soft_tokens: NDArray[np.int64] = np.zeros(meta["documents"], np.int64)
            """Tokens of each document that stand for media; a corpus from before they were kept has none."""
            if meta.get("soft_tokens"):
                self.soft_tokens = np.load(folder / _SOFT_TOKENS)
            self._ends, self._details = np.zeros_like(self.offsets), np.zeros(0, np.uint8)
            if meta["details"]:
                self._ends = np.load(folder / _ENDS)
                self._details = np.memmap(folder / _DETAILS, dtype=np.uint8, mode="r")
            same = len(self.tokens) == meta["tokens"] == self.offsets[-1] and len(self.offsets) == meta["documents"] + 1
            same = same and len(self.hashes) == len(self.soft_tokens) == meta["documents"]
            same_details = len(self._ends) == len(self.offsets) and len(self._details) == self._ends[-1]
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._damaged(f"cannot be read ({error})") from None
        if not same:
            raise self._damaged(f"has {len(self.tokens)} tokens where its {META} says {meta['tokens']}")
        if not same_details:
            raise self._damaged(f"has a {_DETAILS} of another size than was written")

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker that is not forked opens the files itself, rather than get all tokens."""
        return Shard, (self.folder, self.roots)

    def _compare(self, written: dict[str, str], digests: Digests) -> None:
        for name, digest in written.items():
            if digests.of(self.folder / name) != digest:
                raise self._damaged(f"is not what was written ({name} has another checksum)")

    def _damaged(self, how: str) -> ShardError:
        return ShardError(f"corpus {self.folder} {how}; delete the folder to prepare it again.")

    @property
    def num_documents(self) -> int:
        """How many documents the folder holds."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int, start: int = 0, stop: int | None = None) -> Document:
        """A document of which only tokens [start, stop) are read; what is supervised still counts from its start."""
        first, end = int(self.offsets[index]), int(self.offsets[index + 1])
        ids = self.tokens[first + start : end if stop is None else min(first + stop, end)].astype(np.int64)
        line = bytes(self._details[self._ends[index] : self._ends[index + 1]])
        if not line:
            return Document(ids, [[1, end - first]])
        details: dict[str, Any] = json.loads(line)
        return Document(ids, details["supervised"], [self._placed(MediaFile(**file)) for file in details["media"]])

    def _placed(self, file: MediaFile) -> MediaFile:
        root = self.roots[file.root] if self.roots else Path()
        return replace(file, path=str(placed(file.path, root, self.folder)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
