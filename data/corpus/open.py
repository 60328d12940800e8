"""The data of a run: each source prepared as its format asks, all with one tokenizer, and their sequences mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from torch.utils.data import Dataset

from data.batch import Row
from data.chat.documents import ChatFormat
from data.chat.read import ANY_SHAPE
from data.chat.shapes import LineShape
from data.corpus.dataset import PackedDataset
from data.corpus.mixture import Mixture, whole_parts
from data.corpus.prepare import Format, Policy, prepare
from data.corpus.text import TextFormat
from model import ConfigError, Gemma4Config


class Source(NamedTuple):
    """What to read, its share of the sequences, and how to read it."""

    path: str
    weight: float
    format: str
    shape: LineShape | None = None
    """How its lines of conversations are written; unset: as those of the settings."""


@dataclass(frozen=True)
class Settings:
    """How the sources of a run are read; without a tokenizer the first source trains one, of `vocab_size` pieces."""

    model: Gemma4Config
    sequence_length: int
    seed: int
    tokenizer: Path | None = None
    vocab_size: int = 8192
    thinking: bool = False
    shape: LineShape = ANY_SHAPE
    """How lines of conversations are written."""
    cache: Path | None = None
    policy: Policy = field(default_factory=Policy)


FORMATS: dict[str, Callable[[Settings], Format]] = {
    "text": lambda settings: TextFormat(settings.tokenizer, settings.vocab_size),
    "chat": lambda settings: ChatFormat(
        settings.tokenizer, settings.model, settings.sequence_length, settings.thinking, settings.shape
    ),
}


@dataclass(frozen=True)
class Data:
    """The prepared sources of a run; `dataset[i]` is sequence i of it, whatever the mesh."""

    sources: list[Source]
    datasets: list[PackedDataset]
    parts: list[int]
    """Whole parts of the sequences that each source gives."""
    dataset: Dataset[Row]
    format: Format
    """How the first source is read."""
    name: str
    """Tells whether another run has the same documents, in the same shares."""

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that all sources have together."""
        return sum(dataset.sequences_per_epoch for dataset in self.datasets)

    def epochs(self, sequences: int) -> list[float]:
        """Times that the first `sequences` of the run use each source."""
        shares = (sequences * part / sum(self.parts) for part in self.parts)
        return [share / dataset.sequences_per_epoch for share, dataset in zip(shares, self.datasets, strict=True)]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that all sources share: given, or trained on the first."""
        return self.datasets[0].corpus.tokenizer

    @property
    def tokenizer_file(self) -> Path:
        """Where the shared tokenizer is kept beside the first prepared source."""
        return self.datasets[0].corpus.folder / "tokenizer.json"


def open_data(sources: Sequence[Source], settings: Settings) -> Data:
    """Prepare the sources, unless the cache has them. Raises `UserError` for what cannot be used."""
    datasets, names, formats = [], [], []
    parts = whole_parts([source.weight for source in sources])
    for source, part in zip(sources, parts, strict=True):
        formats.append(FORMATS[source.format](replace(settings, shape=source.shape or settings.shape)))
        corpus = prepare(source.path, formats[-1], settings.cache, settings.policy)
        settings = replace(settings, tokenizer=settings.tokenizer or corpus.folder)
        datasets.append(PackedDataset(corpus, settings.sequence_length, settings.seed, settings.model))
        names.append(f"{part} x {corpus.shard.digest}" if len(parts) > 1 else corpus.shard.digest)
    _check_vocabulary(datasets[0].shard.vocab_size, settings.model)
    mixed = Mixture(datasets, parts) if len(parts) > 1 else datasets[0]
    return Data(list(sources), datasets, parts, mixed, formats[0], " + ".join(names))


def _check_vocabulary(found: int, model: Gemma4Config) -> None:
    legal = model.vocab_size
    if model.hidden_size_per_layer_input:
        legal = min(legal, model.vocab_size_per_layer_input)
    if found > legal:
        raise ConfigError(
            f"the tokenizer has {found} pieces, more than the model's vocabulary of {legal}; give a smaller tokenizer, "
            "or larger model.vocab_size and model.vocab_size_per_layer_input. Released weights need larger "
            f"tables first: resize_token_embeddings({found}) of transformers makes both larger, then save_pretrained."
        )
