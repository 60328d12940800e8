"""Packed sequences addressed by their index in the run, the same for every mesh, worker and restart.

An epoch is the corpus shuffled by document, end to end, cut into sequences of S tokens (the
tail is dropped), and the sequences shuffled again, so that neighbours in a batch come from
different documents. Attention stays inside a document, and no label crosses into the next.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.batch import IGNORE, Row
from data.shards import ShardError, TokenShard


class _Epoch(NamedTuple):
    """Order of documents, the stream offset at which each ends, and the order of sequences."""

    documents: NDArray[np.int64]
    ends: NDArray[np.int64]
    sequences: NDArray[np.int64]


class PackedDataset(Dataset[Row]):
    """`dataset[i]` is row i of the run; defined for every i >= 0."""

    def __init__(self, shard: TokenShard, sequence_length: int, seed: int) -> None:
        self.shard = shard
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokens_per_epoch = int(shard.offsets[-1])
        if self.tokens_per_epoch < 2:
            raise ShardError("the corpus is empty; data.source must hold at least one document.")
        self.sequences_per_epoch = max(1, self.tokens_per_epoch // sequence_length)
        self._epochs: dict[int, _Epoch] = {}

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            generator = np.random.default_rng((self.seed, number))
            documents = generator.permutation(self.shard.num_documents)
            sequences = generator.permutation(self.sequences_per_epoch)
            self._epochs = {number: _Epoch(documents, np.cumsum(self.shard.lengths[documents]), sequences)}
        return self._epochs[number]

    def __getitem__(self, index: int) -> Row:
        length = self.sequence_length
        number, index = divmod(index, self.sequences_per_epoch)
        epoch = self._epoch(number)
        first = int(epoch.sequences[index]) * length
        tokens = np.empty(length, dtype=np.int64)
        labels = np.full(length, IGNORE, dtype=np.int64)
        positions = np.empty(length, dtype=np.int64)
        documents = np.empty(length, dtype=np.int64)
        filled = count = 0
        while filled < length:
            offset = (first + filled) % self.tokens_per_epoch  # wraps if the corpus is shorter than a sequence
            place = int(np.searchsorted(epoch.ends, offset, side="right"))
            document = int(epoch.documents[place])
            start = offset - int(epoch.ends[place] - self.shard.length(document))
            piece = self.shard.document(document, start, start + length - filled + 1)
            taken = min(len(piece), length - filled)
            rows = slice(filled, filled + taken)
            tokens[rows] = piece[:taken]
            labels[filled : filled + min(taken, len(piece) - 1)] = piece[1 : taken + 1]
            positions[rows] = np.arange(taken)
            documents[rows] = count
            filled += taken
            count += 1
        as_tensor = torch.from_numpy
        return Row(as_tensor(tokens), as_tensor(labels), as_tensor(positions), as_tensor(documents))
