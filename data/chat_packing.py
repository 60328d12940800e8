"""Whole conversations packed into rows addressed by their index in the run, as `data.packing` does for text.

How many rows there are, and the sizes of the conversations in each, follow from the lengths and the seed alone, so
every epoch has the same number of rows. What is shuffled anew in each epoch is which conversation of a size takes which
place, and the order of the rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.batch import IGNORE, Row
from data.chat_media import load_media, media_processor
from data.chat_prepare import ChatCorpus
from data.shards import ShardError
from model import Gemma4Config

_SIZE_BITS = 7
"""Sizes are lengths rounded up to so many binary digits, 1/64 at most, so that more conversations share one."""


class _Epoch(NamedTuple):
    """The conversation in each place, and the order of rows."""

    conversations: NDArray[np.int64]
    rows: NDArray[np.int64]


class ChatDataset(Dataset[Row]):
    """`dataset[i]` is row i of the run, its media loaded and processed; defined for every i >= 0.

    A conversation is a document of its own, and so is the padding at the end of a row. Raises `ShardError` if a
    conversation is longer than a row, and `MediaError` from `dataset[i]` for a media file that is gone or has changed.
    """

    def __init__(self, corpus: ChatCorpus, sequence_length: int, seed: int, config: Gemma4Config) -> None:
        self.shard = corpus.shard
        self.sequence_length = sequence_length
        self.seed = seed
        self.pad = config.pad_token_id
        self.processor = media_processor(config)
        lengths = self.shard.lengths
        if lengths.max() > sequence_length:
            raise ShardError(
                f"corpus {corpus.folder} holds a conversation of {lengths.max()} tokens, more than "
                f"data.sequence_length={sequence_length}; prepare it for that length."
            )
        self._sizes = np.minimum(_rounded_up(lengths), sequence_length)
        self._by_size = np.argsort(self._sizes, kind="stable")
        rows = plan_rows(self._sizes, sequence_length, np.random.default_rng(seed).permutation(len(lengths)))
        self.sequences_per_epoch = len(rows)
        self._places = np.concatenate(rows)
        self._ends = np.cumsum([0, *map(len, rows)])
        self._epochs: dict[int, _Epoch] = {}

    @property
    def efficiency(self) -> float:
        """Tokens that are not padding, as a share of all."""
        return int(self.shard.offsets[-1]) / (self.sequences_per_epoch * self.sequence_length)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            generator = np.random.default_rng((self.seed, number))
            shuffled = generator.permutation(len(self._sizes))
            conversations = np.empty_like(shuffled)
            conversations[self._by_size] = shuffled[np.argsort(self._sizes[shuffled], kind="stable")]
            self._epochs = {number: _Epoch(conversations, generator.permutation(self.sequences_per_epoch))}
        return self._epochs[number]

    def conversations(self, index: int) -> list[int]:
        """Which conversations of the corpus are in row `index`, in order."""
        number, index = divmod(index, self.sequences_per_epoch)
        epoch = self._epoch(number)
        row = epoch.rows[index]
        return epoch.conversations[self._places[self._ends[row] : self._ends[row + 1]]].tolist()

    def __getitem__(self, index: int) -> Row:
        length = self.sequence_length
        chats = [self.shard.chat(i) for i in self.conversations(index)]
        tokens = np.full(length, self.pad, dtype=np.int64)
        labels = np.full(length, IGNORE, dtype=np.int64)
        positions = np.empty(length, dtype=np.int64)
        documents = np.full(length, len(chats), dtype=np.int64)
        filled = 0
        for number, chat in enumerate(chats):
            end = filled + len(chat.ids)
            tokens[filled:end] = chat.ids
            labels[filled : end - 1] = np.where(chat.supervised[1:], chat.ids[1:], IGNORE)
            positions[filled:end] = np.arange(end - filled)
            documents[filled:end] = number
            filled = end
        positions[filled:] = np.arange(length - filled)
        files = [file for chat in chats for file in chat.media]
        images, clips = load_media(files, self.processor, self.shard.folder)
        as_tensor = torch.from_numpy
        return Row(as_tensor(tokens), as_tensor(labels), as_tensor(positions), as_tensor(documents), images, clips)


def plan_rows(sizes: NDArray[np.int64], capacity: int, order: NDArray[np.int64]) -> list[list[int]]:
    """Rows of places in `sizes`, none above `capacity`: best fit, each place in turn to the row with the least room.

    Rows are found by their room, of which there are at most `capacity` kinds, so all stay open at little cost.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # ascending, each once
    rows_with: dict[int, list[int]] = {}
    for place, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        i = bisect_left(rooms, size)
        if i == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[i]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[i]
        rows[row].append(place)
        others = rows_with.setdefault(room - size, [])
        if not others:
            insort(rooms, room - size)
        others.append(row)
    return rows


def _rounded_up(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    grain = 2 ** np.maximum(np.frexp(lengths)[1] - _SIZE_BITS, 0)
    return -(-lengths // grain) * grain
