"""Tokenised documents on disk: one flat file of ids, memory-mapped, and the offsets of its documents.

A document that is not plain text has a line of JSON beside it: what of it the model learns to write, and its media.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data.media.files import MediaFile
from model.errors import UserError

Ids: TypeAlias = Sequence[int] | NDArray[np.int64]

_META, _TOKENS, _OFFSETS = "meta.json", "tokens.bin", "offsets.npy"
_DETAILS, _ENDS = "details.jsonl", "details.npy"


class ShardError(UserError):
    """A damaged corpus, or one that cannot be packed as asked."""


@dataclass
class Counts:
    """What became of the documents of a source."""

    kept: int = 0
    cut: int = 0
    """Conversations that were kept, but lost turns at the end."""
    too_long: int = 0
    """Left out: nothing supervised in the turns that fit."""
    unsupervised: int = 0
    """Left out: nothing supervised at all."""

    def __str__(self) -> str:
        return f"{self.cut} cut; left out: {self.too_long} too long, {self.unsupervised} with nothing supervised"


@dataclass(frozen=True)
class Document:
    """A tokenised text or conversation."""

    ids: Ids
    supervised: Sequence[Sequence[int]]
    """Start and stop of each run of tokens that the model learns to write: these very tokens, not shifted."""
    media: list[MediaFile] = field(default_factory=list)
    """In the order of their tokens."""

    @classmethod
    def text(cls, ids: Ids) -> Document:
        """Plain text, of which all but the first token is learned."""
        return cls(ids, [[1, len(ids)]])


def write_shard(folder: Path, documents: Iterable[Document], vocab_size: int, counts: Counts) -> None:
    """Write to an existing folder, ids in two bytes where the vocabulary allows.

    Only one document is held at a time; `counts` is read when all are written.
    """
    dtype, offsets, ends = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32), [0], [0]
    with (folder / _TOKENS).open("wb") as tokens, (folder / _DETAILS).open("wb") as details:
        for document in documents:
            tokens.write(np.asarray(document.ids, dtype=dtype).tobytes())
            offsets.append(offsets[-1] + len(document.ids))
            line = {"supervised": document.supervised, "media": [asdict(file) for file in document.media]}
            is_text = document == Document.text(document.ids)
            ends.append(ends[-1] + (0 if is_text else details.write(json.dumps(line).encode() + b"\n")))
    np.save(folder / _OFFSETS, np.asarray(offsets, dtype=np.int64))
    if ends[-1]:
        np.save(folder / _ENDS, np.asarray(ends, dtype=np.int64))
    else:
        (folder / _DETAILS).unlink()
    meta = {"dtype": dtype.name, "documents": len(offsets) - 1, "tokens": offsets[-1], "vocab_size": vocab_size}
    meta |= {"details": ends[-1], "counts": asdict(counts)}
    (folder / _META).write_text(json.dumps(meta))


class Shard:
    """Read access to written documents. Raises `ShardError` if files are missing or sizes disagree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            meta: dict[str, Any] = json.loads((folder / _META).read_text())
            self.offsets: NDArray[np.int64] = np.load(folder / _OFFSETS)
            self.tokens = np.memmap(folder / _TOKENS, dtype=meta["dtype"], mode="r")
            self.vocab_size: int = meta["vocab_size"]
            self.counts = Counts(**meta.get("counts", {"kept": meta["documents"]}))
            self._ends, self._details = np.zeros_like(self.offsets), np.zeros(0, np.uint8)
            if meta.get("details"):
                self._ends = np.load(folder / _ENDS)
                self._details = np.memmap(folder / _DETAILS, dtype=np.uint8, mode="r")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"cannot be read ({error})") from None
        if len(self.tokens) != meta["tokens"] or self.offsets[-1] != meta["tokens"]:
            raise self._damaged(f"has {len(self.tokens)} tokens where its meta.json says {meta['tokens']}")
        if len(self._ends) != len(self.offsets) or len(self._details) != self._ends[-1]:
            raise self._damaged(f"has a {_DETAILS} of another size than was written")

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
        return Document(ids, details["supervised"], [MediaFile(**file) for file in details["media"]])
