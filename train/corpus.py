"""The data of a run: prepared by one process of each node while the others wait, then opened by all."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import Dataset

from data.batch import Row
from data.chat_packing import ChatDataset
from data.chat_prepare import ChatCorpus, prepare_chats
from data.chat_template import template_size
from data.packing import PackedDataset
from data.prepare import Corpus, prepare
from model import ConfigError, Gemma4Config, UserError
from parallel.agree import from_all
from parallel.mesh import World
from train.config import Config
from train.faults import StopRequest

log = logging.getLogger("gemwright")


def prepare_corpus(config: Config, model: Gemma4Config, world: World, stop: StopRequest) -> Corpus:
    """Collective. Raises `UserError` for data that cannot be used, or when told to stop meanwhile."""
    store = dist.distributed_c10d._get_default_store()
    prepared = f"gemwright/prepared/{world.rank - world.local_rank}"
    if world.local_rank == 0:
        log.info("preparing %s", config.data.source)
        _prepare(config, model)
        store.set(prepared, "yes")
    while not store.check([prepared]):  # a barrier would give up on a large corpus, and not hear a signal
        if stop:
            raise UserError(f"told to stop by {stop.signal_name} before the data was prepared.")
        time.sleep(0.1)
    corpus = _prepare(config, model)
    names = from_all(corpus.folder.name)
    if len(set(names)) > 1:
        other = next(rank for rank, name in enumerate(names) if name != names[0])
        raise ConfigError(
            f"rank {other} sees other data or another tokenizer than rank 0; "
            "give data.source and data.tokenizer on a file system that all nodes share."
        )
    rows = model.vocab_size
    if model.hidden_size_per_layer_input:
        rows = min(rows, model.vocab_size_per_layer_input)
    if corpus.shard.vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {corpus.shard.vocab_size} pieces, more than the model's vocabulary of {rows}; "
            "give a smaller tokenizer or a larger model.vocab_size and model.vocab_size_per_layer_input."
        )
    return corpus


def _prepare(config: Config, model: Gemma4Config) -> Corpus:
    data, tokenizer = config.data, config.tokenizer
    cache = Path(data.cache) if data.cache else None
    if data.format == "text":
        return prepare(data.source, tokenizer, data.tokenizer_vocab_size, cache)
    if tokenizer is None:
        raise ConfigError(
            "data.format=chat needs a tokenizer; set data.tokenizer, or model.weights to a folder with one."
        )
    return prepare_chats(
        data.source,
        tokenizer,
        size=template_size(model),
        thinking=data.thinking,
        config=model,
        sequence_length=data.sequence_length,
        cache=cache,
    )


def build_dataset(config: Config, model: Gemma4Config, corpus: Corpus) -> Dataset[Row]:
    if isinstance(corpus, ChatCorpus):
        return ChatDataset(corpus, config.data.sequence_length, config.run.seed, model)
    return PackedDataset(corpus.shard, config.data.sequence_length, config.run.seed)


def describe_data(corpus: Corpus, dataset: Dataset[Row]) -> str:
    shard = corpus.shard
    text = f"{shard.num_documents:,} documents, {len(shard.tokens):,} tokens, {shard.vocab_size} pieces"
    if isinstance(corpus, ChatCorpus) and isinstance(dataset, ChatDataset):
        text += f" | conversations {corpus.counts} | packing leaves {1 - dataset.efficiency:.1%} empty"
    return text
