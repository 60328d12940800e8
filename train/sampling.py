"""Text the model writes in the middle of a run."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch.distributed.fsdp import FSDPModule

from data.tokenizer import BOS, EOS
from model.generate import Sampling, generate
from parallel.apply import ParallelModel
from parallel.tensor.tokens import tokens_on_every_rank


def write_samples(
    parallel: ParallelModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    *,
    device: torch.device,
    seed: int,
    step: int,
) -> list[dict[str, Any]]:
    """One continuation per prompt; a function of (weights, seed, step). Every rank must call it."""
    sampling = Sampling(generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    encoded = [[BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    # Each step is collective: no rank may stop early on its own view of the text, so ends are cut off afterwards.
    with tokens_on_every_rank(parallel.tensor):
        texts = generate(parallel.whole, encoded, max_new_tokens, sampling=sampling, device=device)
    if isinstance(parallel.whole, FSDPModule):
        parallel.whole.reshard()  # a forward without a backward leaves the root gathered
    return [
        {"step": step, "prompt": prompt, "text": tokenizer.decode(text[: text.index(EOS)] if EOS in text else text)}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
