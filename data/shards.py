"""Tokenised documents on disk: one flat file of ids, memory-mapped, and the offsets of its documents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError

_META, _TOKENS, _OFFSETS = "meta.json", "tokens.bin", "offsets.npy"


class ShardError(UserError):
    """A damaged corpus."""


def damaged(folder: Path, how: str) -> ShardError:
    return ShardError(f"corpus {folder} {how}; delete the folder to prepare it again.")


def write_shard(folder: Path, documents: Iterable[list[int]], vocab_size: int) -> None:
    """Write token lists to an existing folder, ids in two bytes where the vocabulary allows."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    offsets = [0]
    with (folder / _TOKENS).open("wb") as out:
        for tokens in documents:
            out.write(np.asarray(tokens, dtype=dtype).tobytes())
            offsets.append(offsets[-1] + len(tokens))
    np.save(folder / _OFFSETS, np.asarray(offsets, dtype=np.int64))
    meta = {
        "dtype": dtype.name,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "vocab_size": vocab_size,
    }
    (folder / _META).write_text(json.dumps(meta))


def add_facts(folder: Path, **facts: Any) -> None:
    """Write more into the meta.json of a written shard."""
    meta = json.loads((folder / _META).read_text())
    (folder / _META).write_text(json.dumps(meta | facts))


class TokenShard:
    """Read access to a written shard. Raises `ShardError` if files are missing or sizes disagree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta = meta = json.loads((folder / _META).read_text())
            self.offsets: NDArray[np.int64] = np.load(folder / _OFFSETS)
            self.tokens = np.memmap(folder / _TOKENS, dtype=meta["dtype"], mode="r")
            self.vocab_size: int = meta["vocab_size"]
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise damaged(folder, f"cannot be read ({error})") from None
        if len(self.tokens) != meta["tokens"] or self.offsets[-1] != meta["tokens"]:
            raise damaged(folder, f"has {len(self.tokens)} tokens where its meta.json says {meta['tokens']}")

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def length(self, document: int) -> int:
        return int(self.offsets[document + 1] - self.offsets[document])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def document(self, index: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of one document, which may end before `stop`."""
        first, end = self.offsets[index], self.offsets[index + 1]
        return np.asarray(self.tokens[first + start : min(first + stop, end)], dtype=np.int64)
