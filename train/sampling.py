"""Text the model writes in the middle of a run."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch.distributed.fsdp import FSDPModule

from data.tokenizer import BOS, EOS
from model import Gemma4
from model.generate import generate


def write_samples(
    model: Gemma4, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int, seed: int, step: int
) -> list[dict[str, Any]]:
    """One continuation per prompt; a function of (weights, seed, step). Every rank must call it."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    encoded = [[BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    texts = generate(model, encoded, max_new_tokens, stop=[EOS], generator=generator, device=device)
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward without a backward leaves the root gathered
    return [
        {"step": step, "prompt": prompt, "text": tokenizer.decode(text)}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
