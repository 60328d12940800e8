"""Which pieces of which documents make up each sequence: `Split` for texts, `Whole` for conversations.

A packing knows the lengths of documents and nothing else of them. All epochs have as many sequences; which document
stands where is drawn anew for each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data.corpus.shards import ShardError

Ints: TypeAlias = NDArray[np.int64]

_SIZE_BITS = 7
"""A size is a length rounded up to this many binary digits (by 1/64 at most), so that more documents have the same."""


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class Split:
    """Documents end to end, cut into sequences: one may run over the end of a sequence. The tail is dropped."""

    padding = 0.0

    def __init__(self, lengths: Ints, sequence_length: int, seed: int) -> None:
        self.lengths, self.sequence_length = lengths, sequence_length
        self.num_tokens = int(lengths.sum())
        if self.num_tokens < 2:
            raise ShardError("the corpus is empty; data.source must hold at least one document.")
        self.sequences_per_epoch = max(1, self.num_tokens // sequence_length)

    def epoch(self, shuffled: Ints) -> Callable[[int], list[Piece]]:
        """The pieces of each sequence of an epoch whose documents come in this order."""
        return partial(self._pieces, shuffled, np.cumsum(self.lengths[shuffled]))

    def _pieces(self, documents: Ints, ends: Ints, sequence: int) -> list[Piece]:
        pieces: list[Piece] = []
        offset, missing = sequence * self.sequence_length, self.sequence_length
        while missing:
            offset %= self.num_tokens  # wraps if the corpus is shorter than a sequence
            place = int(np.searchsorted(ends, offset, side="right"))
            document, taken = int(documents[place]), min(int(ends[place]) - offset, missing)
            start = offset - int(ends[place] - self.lengths[document])
            pieces.append(Piece(document, start, start + taken))
            offset, missing = offset + taken, missing - taken
        return pieces


class Whole:
    """Documents that are never cut, several to a sequence, which ends in padding.

    The sizes that share a sequence are the same in each epoch; which document of a size takes which place is not.
    Raises `ShardError` if a document is longer than a sequence.
    """

    def __init__(self, lengths: Ints, sequence_length: int, seed: int) -> None:
        if lengths.max() > sequence_length:
            raise ShardError(
                f"the corpus holds a conversation of {lengths.max()} tokens, more than "
                f"data.sequence_length={sequence_length}; prepare it for that length."
            )
        self.lengths = lengths
        self.sizes = np.minimum(_rounded_up(lengths), sequence_length)
        self.by_size = np.argsort(self.sizes, kind="stable")
        bins = best_fit(self.sizes, sequence_length, np.random.default_rng(seed).permutation(len(lengths)))
        self.places = np.concatenate(bins)
        self.ends = np.cumsum([0, *map(len, bins)])
        self.sequences_per_epoch = len(bins)
        self.padding = 1 - int(lengths.sum()) / (len(bins) * sequence_length)

    def epoch(self, shuffled: Ints) -> Callable[[int], list[Piece]]:
        """What makes each sequence of an epoch, given its documents in random order."""
        documents = np.empty_like(shuffled)
        documents[self.by_size] = shuffled[np.argsort(self.sizes[shuffled], kind="stable")]
        return partial(self._pieces, documents)

    def _pieces(self, documents: Ints, sequence: int) -> list[Piece]:
        places = self.places[self.ends[sequence] : self.ends[sequence + 1]]
        return [Piece(document, 0, int(self.lengths[document])) for document in documents[places].tolist()]


Packing: TypeAlias = Split | Whole


def best_fit(sizes: Ints, capacity: int, order: Ints) -> list[list[int]]:
    """Bins of indices into `sizes`, none above `capacity`: each size in turn goes to the bin with the least room.

    Bins are found by their room, of which there are at most `capacity` kinds, so all stay open at little cost.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # ascending, each once
    bins_with: dict[int, list[int]] = {}
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        i = bisect_left(rooms, size)
        if i == len(rooms):
            found, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[i]
            found = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[i]
        bins[found].append(index)
        others = bins_with.setdefault(room - size, [])
        if not others:
            insort(rooms, room - size)
        others.append(found)
    return bins


def _rounded_up(lengths: Ints) -> Ints:
    grain = 2 ** np.maximum(np.frexp(lengths)[1] - _SIZE_BITS, 0)
    return -(-lengths // grain) * grain
