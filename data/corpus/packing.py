"""Which pieces of which documents make up each sequence: `Split` or `BestFit` for texts, `Whole` for conversations.

A packing knows the lengths of documents, how many of their tokens stand for media, and nothing else of them. All epochs
have as many sequences; which document stands where is drawn anew for each.
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


class MediaBudget(NamedTuple):
    """Soft tokens of the media of each document, and the most that a sequence may have."""

    tokens: Ints
    most: int


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

    With a budget, a sequence has no more media than it allows. Raises `ShardError` if a document alone is more than a
    sequence holds.
    """

    name = "whole"

    def __init__(self, lengths: Ints, sequence_length: int, seed: int, budget: MediaBudget | None = None) -> None:
        if lengths.max() > sequence_length:
            raise ShardError(
                f"the corpus holds a conversation of {lengths.max()} tokens, more than "
                f"data.sequence_length={sequence_length}; prepare it for that length."
            )
        if budget is not None and budget.tokens.max() > budget.most:
            raise ShardError(
                f"the corpus holds a conversation with {budget.tokens.max()} soft tokens of media, more than "
                f"data.max_media_tokens={budget.most}; prepare it for that number."
            )
        self._pack(np.arange(len(lengths)), np.zeros_like(lengths), lengths, sequence_length, seed, budget)

    def _pack(
        self,
        documents: Ints,
        starts: Ints,
        lengths: Ints,
        sequence_length: int,
        seed: int,
        budget: MediaBudget | None = None,
    ) -> None:
        """Find which sizes of parts of documents share a sequence.

        They are the same in each epoch; which part of a size takes which place is not. A size is of tokens and of
        media.
        """
        self.documents, self.starts, self.lengths = documents, starts, lengths
        tokens = np.minimum(_rounded_up(lengths), sequence_length)
        self.sizes = tokens
        if budget is not None:
            budget = MediaBudget(np.minimum(_rounded_up(budget.tokens), budget.most), budget.most)
            self.sizes = tokens * (budget.most + 1) + budget.tokens
        self.by_size = np.argsort(self.sizes, kind="stable")
        bins = best_fit(tokens, sequence_length, np.random.default_rng(seed).permutation(len(lengths)), budget)
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


def best_fit(sizes: Ints, capacity: int, order: Ints, budget: MediaBudget | None = None) -> list[list[int]]:
    """Bins of indices into `sizes`, none above `capacity`: each size in turn goes to the bin with the least room.

    With a budget, to the one with the least room in which its media have room too, and of several such to the one with
    least room for media. Bins are found by their rooms, of which there are few kinds, so all stay open at little cost.
    """
    most, needs = (0, np.zeros_like(sizes)) if budget is None else (budget.most, budget.tokens)
    bins: list[list[int]] = []
    rooms: list[int] = []  # ascending, each once
    media_rooms: dict[int, list[int]] = {}  # of the bins with a room, ascending, each once
    bins_with: dict[tuple[int, int], list[int]] = {}
    largest = np.full(capacity + 1, -1)  # room for media in any bin with a room
    for index, size, need in zip(order.tolist(), sizes[order].tolist(), needs[order].tolist(), strict=True):
        if need:
            room = size + int((largest[size:] >= need).argmax())
            found = int(largest[room]) >= need
        else:
            i = bisect_left(rooms, size)
            found = i < len(rooms)
            room = rooms[i] if found else 0
        if found:
            left = media_rooms[room][bisect_left(media_rooms[room], need)]
            place = bins_with[room, left].pop()
            if not bins_with[room, left]:
                media_rooms[room].remove(left)
                if not media_rooms[room]:
                    del rooms[bisect_left(rooms, room)]
                if most:
                    largest[room] = media_rooms[room][-1] if media_rooms[room] else -1
        else:
            place, room, left = len(bins), capacity, most
            bins.append([])
        bins[place].append(index)
        room, left = room - size, left - need
        others = bins_with.setdefault((room, left), [])
        if not others:
            lefts = media_rooms.setdefault(room, [])
            if not lefts:
                insort(rooms, room)
            insort(lefts, left)
            if most:
                largest[room] = lefts[-1]
        others.append(place)
    return bins


def _rounded_up(lengths: Ints) -> Ints:
    grain = 2 ** np.maximum(np.frexp(lengths)[1] - _SIZE_BITS, 0)
    return -(-lengths // grain) * grain
