"""Which documents are kept from training: a function of their contents alone.

So it is the same for every mesh, tokenizer, order of files and resume, and copies of a document fall on the same side.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]


class ContentHash:
    """64 bits of a document's contents, which may come in parts."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, text: str) -> None:
        """More of the same document."""
        self._hash.update(text.encode())

    def end(self) -> int:
        """The hash of all that was added, and a fresh start."""
        found = int.from_bytes(self._hash.digest(), "big")
        self._hash = hashlib.blake2b(digest_size=8)
        return found


def hash_of(*texts: str) -> int:
    """64 bits of texts in order; where one ends matters."""
    found = ContentHash()
    for text in texts:
        found.add(f"{len(text)}:{text}")
    return found.end()


def is_held_out(hashes: Hashes, share: float) -> NDArray[np.bool_]:
    """Whether each document is among the `share` that is kept from training; a larger share keeps these and more."""
    return hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))
