"""Sampling with a cache of keys and values: only producers store, sliding layers keep one window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention import KeyValue
from model.config import Gemma4Config, LayerType
from model.gemma4 import Gemma4
from model.masks import AttentionMask


@dataclass
class Cache:
    """Keys and values of the positions so far, per producing layer; a sliding layer drops what left its window."""

    config: Gemma4Config
    num_rows: int
    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """Keys and values [B, S, K, H]."""

    def store(self, layer: int, new: KeyValue) -> KeyValue:
        """Past and new keys and values, which are kept for the next call."""
        both = tuple(t.unflatten(0, (self.num_rows, -1)) for t in new)
        if layer in self.layers:
            both = tuple(torch.cat(pair, dim=1) for pair in zip(self.layers[layer], both, strict=True))
        window = self.config.layer(layer).window
        dropped = 0 if window is None else max(0, both[0].shape[1] - (window - 1))
        self.layers[layer] = tuple(t[:, dropped:] for t in both)
        return KeyValue(*(t.flatten(0, 1) for t in both))


@torch.no_grad()
def generate(
    model: Gemma4,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 0.95,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Continuations of each prompt, up to and including its first stop token.

    temperature 0 is greedy. Prompts of different length are padded on the left; a padded
    position is invisible.
    """
    length = max(map(len, prompts))
    padding = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    cache, past = Cache(model.config, len(prompts)), 0
    last = torch.zeros_like(tokens, dtype=torch.bool)
    last[:, -1] = True
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stops = torch.tensor(list(stop), dtype=torch.long, device=device)
    produced: list[Tensor] = []
    for _ in range(max_new_tokens):
        positions = torch.arange(past, past + tokens.shape[1], device=device)
        hidden = model(
            tokens,
            positions=(positions[None, :] - padding[:, None]).clamp_min(0),
            supervised=last,
            masks=cache_masks(model.config, past, tokens.shape[1], padding),
            store=cache.store,
        )
        past += tokens.shape[1]
        # On the CPU, where every operation has a deterministic form.
        choice = sample(model.logits(hidden).float().cpu(), temperature, top_k, top_p, generator).to(device)
        produced.append(choice)
        done |= torch.isin(choice, stops)
        if bool(done.all()):
            break
        tokens, last = choice[:, None], torch.ones_like(choice[:, None], dtype=torch.bool)
    return [_until_stop(row, set(stop)) for row in torch.stack(produced, dim=1).tolist()]


def sample(
    logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token per row: among the top k, the smallest set whose probability reaches top p."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    values, indices = logits_BV.div(temperature).topk(min(top_k, logits_BV.shape[-1]), dim=-1)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return indices.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def cache_masks(config: Gemma4Config, past: int, new: int, padding: Tensor) -> dict[LayerType, AttentionMask]:
    """Masks of `new` positions after `past` cached ones; a sliding layer's keys start where its cache does."""
    num_rows = len(padding)
    position = torch.arange(past, past + new, device=padding.device).repeat(num_rows)
    row = torch.arange(num_rows, device=padding.device).repeat_interleave(new)
    masks: dict[LayerType, AttentionMask] = {}
    for kind in dict.fromkeys(config.layer_types):
        first, dropped = padding[row], 0
        if kind == "sliding_attention":
            first = torch.maximum(first, position - (config.sliding_window - 1))
            dropped = max(0, past - (config.sliding_window - 1))
        first = torch.minimum(first, position)  # a padded position sees itself alone
        masks[kind] = AttentionMask(
            row, position - dropped, first - dropped, position - dropped, num_rows, past + new - dropped
        )
    return masks


def _until_stop(tokens: list[int], stop: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop:
            return tokens[: index + 1]
    return tokens
