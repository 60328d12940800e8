"""Text the model writes in the middle of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch.distributed.fsdp import FSDPModule

from data.chat.documents import ChatFormat
from data.chat.encode import encode
from data.chat.render import render
from data.chat.template import template_size
from data.corpus.open import Data
from data.tokenizer import BOS, STOPS
from model.generate import Sampling, generate
from parallel.apply import ParallelModel
from parallel.tensor.tokens import tokens_on_every_rank
from train.resolve import Resolved

log = logging.getLogger("gemwright")

_FOUND, _TRIED = 3, 64
"""Prompts taken of the data, and documents that are looked at for them."""
_BEGINNING = 8
"""Tokens of a text that a sample goes on from."""


class Prompt(NamedTuple):
    """A text that a sample goes on from, and its tokens."""

    text: str
    ids: list[int]


def sample_prompts(run: Resolved, data: Data) -> list[Prompt]:
    """The prompts of `train.sample_prompts` in the form of the data, or beginnings of its first documents.

    A prompt of a chat is a user's turn, and the model is asked for its answer.
    """
    given, tokenizer = run.config.train.sample_prompts, data.tokenizer
    if given is None:
        found = list(islice(_beginnings(data), _FOUND))
        if not found:
            log.warning("no samples: the first documents all begin with media; give train.sample_prompts")
        return found
    if not isinstance(data.format, ChatFormat):
        return [Prompt(text, [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]) for text in given]
    size, prompts = template_size(run.model), []
    for text in given:
        turns = [{"role": "user", "content": text}]
        rendered = render(turns, size=size, add_generation_prompt=True, **data.format.flags)
        prompts.append(Prompt(text, encode(rendered, tokenizer).ids))
    return prompts


def _beginnings(data: Data) -> Iterator[Prompt]:
    """Documents up to what is learned of them, held out if any are; one that begins with media is passed over."""
    dataset = [*data.validation.values(), *data.datasets][0]
    for index in dataset.documents[:_TRIED].tolist():
        document = dataset.shard.document(index)
        end = document.supervised[0][0]
        if any(file.start < end for file in document.media):
            continue
        ids = [int(token) for token in document.ids[: end if end > 1 else 1 + _BEGINNING]]
        yield Prompt(data.tokenizer.decode(ids[1:], skip_special_tokens=False), ids)


def write_samples(
    parallel: ParallelModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    device: torch.device,
    seed: int,
    step: int,
) -> list[dict[str, Any]]:
    """One continuation per prompt; a function of (weights, seed, step). Every rank must call it."""
    sampling = Sampling(generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    # Each step is collective: no rank may stop early on its own view of the text, so ends are cut off afterwards.
    with tokens_on_every_rank(parallel.tensor):
        ids = [prompt.ids for prompt in prompts]
        texts = generate(parallel.whole, ids, max_new_tokens, sampling=sampling, device=device)
    if isinstance(parallel.whole, FSDPModule):
        parallel.whole.reshard()  # a forward without a backward leaves the root gathered
    return [
        {"step": step, "prompt": prompt.text, "text": tokenizer.decode(_until_stop(text))}
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def _until_stop(ids: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in STOPS), len(ids))]
