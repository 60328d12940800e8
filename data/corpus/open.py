"""The data of a run: each source prepared as its format asks, all with one tokenizer, and their sequences mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from torch.utils.data import Dataset

from data.batch import Row
from data.chat.documents import ChatFormat
from data.corpus.dataset import PackedDataset
from data.corpus.mixture import Mixture, whole_parts
from data.corpus.prepare import Corpus, Format, prepare
from data.corpus.text import TextFormat
from model import ConfigError, Gemma4Config


class Source(NamedTuple):
    """What to read, its share of the sequences, and how to read it."""

    path: str
    weight: float
    format: str


@dataclass(frozen=True)
class Settings:
    """How the sources of a run are read; without a tokenizer the first source trains one, of `vocab_size` pieces."""

    model: Gemma4Config
    sequence_length: int
    seed: int
    tokenizer: Path | None = None
    vocab_size: int = 8192
    thinking: bool = False
    cache: Path | None = None


def _text(settings: Settings, tokenizer: Path | None) -> Format:
    return TextFormat(tokenizer, settings.vocab_size)


def _chat(settings: Settings, tokenizer: Path | None) -> Format:
    if tokenizer is None:
        raise ConfigError(
            "data.format=chat needs a tokenizer; set data.tokenizer, or model.weights to a folder with one."
        )
    return ChatFormat(tokenizer, settings.model, settings.sequence_length, settings.thinking)


FORMATS = {"text": _text, "chat": _chat}


@dataclass(frozen=True)
class Data:
    """The prepared corpora of a run; `dataset[i]` is sequence i of it, whatever the mesh."""

    corpora: list[Corpus]
    datasets: list[PackedDataset]
    dataset: Dataset[Row]
    name: str
    """Tells whether another run has the same documents, in the same shares."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpora[0].tokenizer

    @property
    def tokenizer_file(self) -> Path:
        return self.corpora[0].folder / "tokenizer.json"

    def __str__(self) -> str:
        return " + ".join(map(_describe, self.corpora, self.datasets))


def open_data(sources: Sequence[Source], settings: Settings) -> Data:
    """Prepare the sources, unless the cache has them. Raises `UserError` for what cannot be used."""
    corpora: list[Corpus] = []
    tokenizer = settings.tokenizer
    for source in sources:
        corpora.append(prepare(source.path, FORMATS[source.format](settings, tokenizer), settings.cache))
        tokenizer = tokenizer or corpora[0].folder
    _check_vocabulary(corpora[0].shard.vocab_size, settings.model)
    datasets = [PackedDataset(corpus, settings.sequence_length, settings.seed, settings.model) for corpus in corpora]
    if len(corpora) == 1:
        return Data(corpora, datasets, datasets[0], corpora[0].folder.name)
    weights = [source.weight for source in sources]
    names = [f"{part} x {corpus.folder.name}" for part, corpus in zip(whole_parts(weights), corpora, strict=True)]
    return Data(corpora, datasets, Mixture(datasets, weights), " + ".join(names))


def _check_vocabulary(found: int, model: Gemma4Config) -> None:
    legal = model.vocab_size
    if model.hidden_size_per_layer_input:
        legal = min(legal, model.vocab_size_per_layer_input)
    if found > legal:
        raise ConfigError(
            f"the tokenizer has {found} pieces, more than the model's vocabulary of {legal}; "
            "give a smaller tokenizer or a larger model.vocab_size and model.vocab_size_per_layer_input."
        )


def _describe(corpus: Corpus, dataset: PackedDataset) -> str:
    shard, counts = corpus.shard, corpus.shard.counts
    text = f"{shard.num_documents:,} documents, {len(shard.tokens):,} tokens, {shard.vocab_size} pieces"
    if counts.cut or counts.too_long or counts.unsupervised:
        text += f" | {counts}"
    if dataset.packing.padding:
        text += f" | packing leaves {dataset.packing.padding:.1%} empty"
    return text
