"""Packed sequences addressed by their index in the run, the same for every mesh, worker and restart.

An epoch is the corpus shuffled by document, packed, and its sequences shuffled again, so that neighbours in a batch
come from different documents. Attention stays inside a document, and no label crosses into the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.batch import IGNORE, Row
from data.corpus.packing import Ints, MediaBudget, Packing, Piece, Whole
from data.corpus.prepare import Corpus
from data.media.features import FeatureCache
from data.media.files import load_media, media_processor
from data.media.process import MediaProcessor
from model import Gemma4Config


class PackedDataset(Dataset[Row]):
    """`dataset[i]` is sequence i of the run, its media loaded and processed; defined for every i >= 0.

    chosen: whether each document of the corpus takes part; without it all do; features: where processed media are
    kept. Padding at the end of a sequence is a
    document of its own. Raises `MediaError` from `dataset[i]` for a media file that is gone or has changed.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        seed: int,
        config: Gemma4Config,
        chosen: NDArray[np.bool_] | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        self.features = features
        self.corpus, self.shard = corpus, corpus.shard
        self.sequence_length, self.seed, self.config = sequence_length, seed, config
        self.documents = np.arange(self.shard.num_documents) if chosen is None else np.flatnonzero(chosen)
        self.packing = self._packing()
        self._epochs: dict[int, tuple[Callable[[int], list[Piece]], Ints]] = {}

    def _packing(self) -> Packing:
        lengths, most = self.shard.lengths[self.documents], self.corpus.max_media_tokens
        if most is None:
            return self.corpus.packing(lengths, self.sequence_length, self.seed)
        budget = MediaBudget(self.shard.soft_tokens[self.documents], most)
        return Whole(lengths, self.sequence_length, self.seed, budget)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences after which every document was used once and the order is drawn anew."""
        return self.packing.sequences_per_epoch

    @cached_property
    def processor(self) -> MediaProcessor:
        """What turns media files into patches and frames of the size this model reads."""
        return media_processor(self.config)

    @property
    def size(self) -> str:
        """How many documents and tokens take part."""
        tokens = int(self.shard.lengths[self.documents].sum())
        return f"{len(self.documents):,} {self.corpus.noun}, {tokens:,} tokens"

    def pieces(self, index: int) -> list[Piece]:
        """What sequence `index` is made of, in order."""
        number, index = divmod(index, self.sequences_per_epoch)
        if number not in self._epochs:
            generator = np.random.default_rng((self.seed, number))
            pieces_of = self.packing.epoch(generator.permutation(len(self.documents)))
            self._epochs = {number: (pieces_of, generator.permutation(self.sequences_per_epoch))}
        pieces_of, sequences = self._epochs[number]
        pieces = pieces_of(int(sequences[index]))
        return [piece._replace(document=int(self.documents[piece.document])) for piece in pieces]

    def __getitem__(self, index: int) -> Row:
        length, pieces = self.sequence_length, self.pieces(index)
        tokens = np.full(length, self.config.pad_token_id, dtype=np.int64)
        labels = np.full(length, IGNORE, dtype=np.int64)
        positions = np.empty(length, dtype=np.int64)
        documents = np.full(length, len(pieces), dtype=np.int64)
        files, filled = [], 0
        for number, (index, start, stop) in enumerate(pieces):
            document = self.shard.document(index, start, stop + 1)  # one more, the label of the last
            end, ids = filled + stop - start, np.asarray(document.ids)
            tokens[filled:end] = ids[: stop - start]
            for first, last in document.supervised:
                learned = slice(max(first - start, 1), max(min(last, stop + 1) - start, 1))
                labels[filled + learned.start - 1 : filled + learned.stop - 1] = ids[learned]
            positions[filled:end] = np.arange(end - filled)
            documents[filled:end] = number
            files += document.media
            filled = end
        positions[filled:] = np.arange(length - filled)
        images, clips = load_media(files, self.processor, self.shard.folder, self.features) if files else ((), ())
        as_tensor = torch.from_numpy
        return Row(as_tensor(tokens), as_tensor(labels), as_tensor(positions), as_tensor(documents), images, clips)

    def __str__(self) -> str:
        shard, counts, padding = self.shard, self.shard.counts, self.packing.padding
        text = f"{self.size}, {shard.vocab_size} pieces"
        left_out = f" | {counts}" if str(counts) else ""
        most = self.corpus.max_media_tokens
        limit = "" if most is None else f" with at most {most:,} soft tokens of media in a sequence"
        return text + left_out + (f" | packing{limit} leaves {padding:.1%} empty" if padding or limit else "")
