"""Which pieces of which documents make up each sequence: `Split` or `BestFit` for texts, `Whole` for conversations.

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


EMPTY = "the corpus is empty; data.source must hold at least one document."


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class Split:
    """Documents end to end, cut into sequences: one may run over the end of a sequence. The tail is dropped."""

    name = "split"
    padding = 0.0

    def __init__(self, lengths: Ints, sequence_length: int, seed: int) -> None:
        self.lengths, self.sequence_length = lengths, sequence_length
        self.num_tokens = int(lengths.sum())
        if self.num_tokens < 2:
            raise ShardError(EMPTY)
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

    Raises `ShardError` if a document is longer than a sequence.
    """

    name = "whole"

    def __init__(self, lengths: Ints, sequence_length: int, seed: int) -> None:
        if lengths.max() > sequence_length:
            raise ShardError(
                f"the corpus holds a conversation of {lengths.max()} tokens, more than "
                f"data.sequence_length={sequence_length}; prepare it for that length."
            )
        self._pack(np.arange(len(lengths)), np.zeros_like(lengths), lengths, sequence_length, seed)

    def _pack(self, documents: Ints, starts: Ints, lengths: Ints, sequence_length: int, seed: int) -> None:
        """Find which sizes of parts of documents share a sequence.

        They are the same in each epoch; which part of a size takes which place is not.
        """
        self.documents, self.starts, self.lengths = documents, starts, lengths
        self.sizes = np.minimum(_rounded_up(lengths), sequence_length)
        self.by_size = np.argsort(self.sizes, kind="stable")
        bins = best_fit(self.sizes, sequence_length, np.random.default_rng(seed).permutation(len(lengths)))
        self.places = np.concatenate(bins)
        self.ends = np.cumsum([0, *map(len, bins)])
        self.sequences_per_epoch = len(bins)
        self.padding = 1 - int(lengths.sum()) / (len(bins) * sequence_length)

    def epoch(self, shuffled: Ints) -> Callable[[int], list[Piece]]:
        """What makes each sequence of an epoch, given its documents in random order."""
        order = np.argsort(np.argsort(shuffled)[self.documents], kind="stable")  # parts, as their documents come
        parts = np.empty_like(order)
        parts[self.by_size] = order[np.argsort(self.sizes[order], kind="stable")]
        return partial(self._pieces, parts)

    def _pieces(self, parts: Ints, sequence: int) -> list[Piece]:
        found = parts[self.places[self.ends[sequence] : self.ends[sequence + 1]]]
        starts = self.starts[found]
        return [*map(Piece, self.documents[found].tolist(), starts.tolist(), (starts + self.lengths[found]).tolist())]


class BestFit(Whole):
    """Documents that are cut only where they are longer than a sequence; sequences end in padding.

    Such a document fills whole sequences, and what is left of it is packed like a shorter one (arXiv:2404.10830).
    """

    name = "best_fit"

    def __init__(self, lengths: Ints, sequence_length: int, seed: int) -> None:
        if not lengths.sum():
            raise ShardError(EMPTY)
        parts = -(-lengths // sequence_length)
        documents = np.repeat(np.arange(len(lengths)), parts)
        number = np.arange(len(documents)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = number * sequence_length
        self._pack(documents, starts, np.minimum(lengths[documents] - starts, sequence_length), sequence_length, seed)


Packing: TypeAlias = Split | Whole

PACKINGS: dict[str, type[Packing]] = {"split": Split, "best_fit": BestFit}
"""How texts may fill sequences."""


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
