"""The data of a run: each source prepared as its format asks, all with one tokenizer, and their sequences mixed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from data.batch import Row
from data.chat.documents import ChatFormat
from data.chat.read import ANY_SHAPE
from data.chat.shapes import LineShape
from data.corpus.dataset import PackedDataset
from data.corpus.held_out import is_held_out
from data.corpus.mixture import Mixture, Stage, Turns, shares_by_size, whole_parts
from data.corpus.packing import PACKINGS, BestFit
from data.corpus.prepare import Corpus, Format, Policy, prepare
from data.corpus.text import TextFormat
from data.media.features import FeatureCache
from model import ConfigError, Gemma4Config


class Source(NamedTuple):
    """What to read, its share of the sequences, and how to read it."""

    path: str
    weight: float
    format: str
    epochs: float | None = None
    """Most times that it is used."""
    max_tokens: int | None = None
    """Most tokens that are taken of it, with the padding of their sequences."""
    shape: LineShape | None = None
    """How its lines of conversations are written; unset: as those of the settings."""

    @property
    def name(self) -> str:
        """What metrics call it: the end of its path."""
        return Path(self.path).name or self.path

    def limit(self, dataset: PackedDataset) -> int | None:
        """Most sequences that it gives."""
        limits = []
        if self.epochs is not None:
            limits.append(round(self.epochs * dataset.sequences_per_epoch))
        if self.max_tokens is not None:
            limits.append(self.max_tokens // dataset.sequence_length)
        return max(min(limits), 1) if limits else None


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
    packing: str = "split"
    """How texts fill sequences: a name of `PACKINGS`."""
    on_long: str = "cut"
    """What becomes of a conversation that is longer than a sequence: one of `ON_LONG`."""
    cache: Path | None = None
    policy: Policy = field(default_factory=Policy)
    held_out: float = 0.0
    """Share of each source's documents that is kept from training."""
    validation: Sequence[Source] = ()
    """Sources that are not trained on at all."""
    temperature: float | None = None
    """Weights are times the sizes of sources to the power one over it."""
    features: FeatureCache | None = None
    """Where processed media are kept, if they are."""
    max_media_tokens: int | None = None
    """Most soft tokens of media in a sequence of conversations."""
    stages: Sequence[Stage] = ()
    """From which sequence of the run on sources have other weights."""


FORMATS: dict[str, Callable[[Settings], Format]] = {
    "text": lambda settings: TextFormat(settings.tokenizer, settings.vocab_size, PACKINGS[settings.packing]),
    "chat": lambda settings: ChatFormat(
        settings.tokenizer,
        settings.model,
        settings.sequence_length,
        settings.thinking,
        settings.shape,
        settings.on_long,
        settings.max_media_tokens,
    ),
}


@dataclass(frozen=True)
class Data:
    """The prepared sources of a run; `dataset[i]` is sequence i of it, whatever the mesh."""

    sources: list[Source]
    datasets: list[PackedDataset]
    keys: list[str]
    """What tells the documents of each source from others; each once."""
    turns: Turns
    format: Format
    """How the first source is read."""
    validation: dict[str, PackedDataset] = field(default_factory=dict)
    """What the loss is measured on, by the name of its source; no document of it is in `datasets`."""
    kept_away: int = 0
    """Documents of training sources that are not trained on because a validation source has them too."""

    @property
    def dataset(self) -> Dataset[Row]:
        """The sequences of the run."""
        return Mixture(self.datasets, self.turns)

    @property
    def name(self) -> str:
        """Tells whether another run has the same documents, in the same shares."""
        first, *later = self.turns.stages
        several = len(self.keys) > 1
        sources = [
            (f"{part} x " if several else "") + key + ("" if limit is None else f" up to {limit}")
            for part, key, limit in zip(whole_parts(first.weights), self.keys, self.turns.limits, strict=True)
        ]
        stages = [f"from {stage.first} on {', '.join(map(str, whole_parts(stage.weights)))}" for stage in later]
        return " + ".join(sources) + "".join(f"; {stage}" for stage in stages)

    @property
    def names(self) -> list[str]:
        """What metrics call the sources, each once."""
        names: list[str] = []
        for source in self.sources:
            names.append(_unused(source.name, names))
        return names

    def going_on(self, since: int, used: Mapping[str, int]) -> Data:
        """The same where a run goes on, in which sources, by key, gave `used` sequences before sequence `since`."""
        before = [used.get(key, 0) for key in self.keys]
        return replace(self, turns=Turns(self.turns.stages, self.turns.limits, since, before))

    def used(self, sequences: int) -> dict[str, int]:
        """How many of the first `sequences` each source gives, by key."""
        return dict(zip(self.keys, self.turns.counts(sequences), strict=True))

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that all sources have together."""
        return sum(dataset.sequences_per_epoch for dataset in self.datasets)

    def epochs(self, sequences: int) -> list[float]:
        """Times that the first `sequences` of the run use each source."""
        counts = self.turns.counts(sequences)
        return [count / dataset.sequences_per_epoch for count, dataset in zip(counts, self.datasets, strict=True)]

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
    formats: list[Format] = []
    corpora: list[Corpus] = []
    for source in [*sources, *settings.validation]:
        formats.append(FORMATS[source.format](replace(settings, shape=source.shape or settings.shape)))
        corpora.append(prepare(source.path, formats[-1], settings.cache, settings.policy))
        settings = replace(settings, tokenizer=settings.tokenizer or corpora[0].folder)
    _check_vocabulary(corpora[0].shard.vocab_size, settings.model)
    corpora, others = corpora[: len(sources)], corpora[len(sources) :]
    never = np.concatenate([np.zeros(0, np.uint64), *(corpus.shard.hashes for corpus in others)])
    datasets, keys, kept_away = list[PackedDataset](), list[str](), 0
    validation: dict[str, PackedDataset] = {}
    for source, corpus in zip(sources, corpora, strict=True):
        held_out, known = is_held_out(corpus.shard.hashes, settings.held_out), np.isin(corpus.shard.hashes, never)
        kept_away += int(known.sum())
        trained = ~held_out & ~known
        _check_parts(source, trained, held_out, settings.held_out)
        datasets.append(_packed(corpus, settings, trained, settings.seed))
        if settings.held_out:
            validation[_unused(source.name, validation)] = _packed(corpus, settings, held_out & ~known)
        key = corpus.shard.digest if trained.all() else f"{corpus.shard.digest} without {_digest(~trained)}"
        key += " by best fit" if corpus.packing is BestFit else ""
        key += "" if corpus.max_media_tokens is None else f" with {corpus.max_media_tokens} of media"
        keys.append(_unused(key, keys))
    for source, corpus in zip(settings.validation, others, strict=True):
        validation[_unused(source.name, validation)] = _packed(corpus, settings, None)
    turns = Turns(_stages(sources, datasets, settings), [s.limit(d) for s, d in zip(sources, datasets, strict=True)])
    return Data(list(sources), datasets, keys, turns, formats[0], validation, kept_away)


def _stages(sources: Sequence[Source], datasets: Sequence[PackedDataset], settings: Settings) -> list[Stage]:
    """Weights from the first sequence on, and from later ones."""
    stages = [Stage(0, [source.weight for source in sources]), *settings.stages]
    if settings.temperature is None:
        return stages
    sizes = [int(dataset.shard.lengths[dataset.documents].sum()) for dataset in datasets]
    return [replace(stage, weights=shares_by_size(stage.weights, sizes, settings.temperature)) for stage in stages]


def _packed(corpus: Corpus, settings: Settings, chosen: NDArray[np.bool_] | None, seed: int = 0) -> PackedDataset:
    """Sequences of the chosen documents; those that measure the loss are the same whatever the run's seed."""
    return PackedDataset(corpus, settings.sequence_length, seed, settings.model, chosen, settings.features)


def _digest(flags: NDArray[np.bool_]) -> str:
    return hashlib.sha256(np.packbits(flags).tobytes()).hexdigest()[:20]


def _unused(name: str, names: Collection[str]) -> str:
    """The name itself, or with a number where another source has it."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in names else next(other for other in numbered if other not in names)


def _check_parts(source: Source, trained: NDArray[np.bool_], held_out: NDArray[np.bool_], share: float) -> None:
    """Raises `ConfigError` where nothing is left to train on, or nothing to measure."""
    if not trained.any():
        raise ConfigError(
            f"none of the {len(trained):,} documents of {source.path} is left to train on; lower data.held_out={share} "
            "or take other data.validation."
        )
    if share and not held_out.any():
        raise ConfigError(
            f"data.held_out={share} holds out none of the {len(trained):,} documents of {source.path}; raise it, or "
            "give data.validation sources of their own."
        )


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
