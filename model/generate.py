"""Sampling with a cache of keys and values: only producers store, sliding layers keep one window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model.attention import KeyValue
from model.config import Gemma4Config, LayerType
from model.errors import UserError
from model.gemma4 import Gemma4
from model.inputs import make_inputs
from model.masks import AttentionMask, layer_masks
from model.media import Media
from model.precision import upcast
from model.token_types import token_types


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are those of the released checkpoints."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 64
    """Tokens of the highest scores that are drawn from; 0 for all."""
    top_p: float = 0.95
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Raises `UserError` for a number that draws nothing."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} is no temperature; give 0 (greedy) or a number above it.")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} leaves no token; give 0 (off) or how many are kept.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} lies outside 0 to 1; 1 is off.")


RELEASED, GREEDY = Sampling(), Sampling(temperature=0)


@dataclass
class Cache:
    """Keys and values of the positions so far, per producing layer; a sliding layer drops what left its window."""

    config: Gemma4Config
    batch_size: int
    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """Keys and values [B, S, K, H]."""

    def store(self, layer: int, new: KeyValue) -> KeyValue:
        """Past and new keys and values, which are kept for the next call."""
        both = tuple(t.unflatten(0, (self.batch_size, -1)) for t in new)
        if layer in self.layers:
            both = tuple(torch.cat(pair, dim=1) for pair in zip(self.layers[layer], both, strict=True))
        window = self.config.layer(layer).window
        dropped = 0 if window is None else max(0, both[0].shape[1] - (window - 1))
        self.layers[layer] = tuple(t[:, dropped:] for t in both)
        return KeyValue(*(t.flatten(0, 1) for t in both))


def generate(
    model: Gemma4,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[int] = (),
    **options: Any,
) -> list[list[int]]:
    """Continuations of each prompt, up to and including its first stop token; options as of `generate_tokens`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_tokens(model, prompts, max_new_tokens, stop=stop, **options):
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
    return [_until_stop(row, set(stop)) for row in rows]


@torch.no_grad()
def generate_tokens(
    model: Gemma4,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    images: Sequence[tuple[Tensor, Tensor]] = (),
    clips: Sequence[Tensor] = (),
    sampling: Sampling = RELEASED,
    stop: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Iterator[list[int]]:
    """The next token of every prompt, step by step, until all have met a stop token.

    images and clips: what the prompts' media tokens stand for, as `Media.build` takes them. Prompts of different
    length are padded on the left; a padded position is invisible.
    """
    config, length = model.config, max(map(len, prompts))
    padding = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
    rows = torch.tensor([[config.pad_token_id] * (length - len(p)) + list(p) for p in prompts])
    media = Media.build(config, rows, images, clips).to(torch.device(device)) if images or clips else None
    tokens = rows.to(device)
    types_BS: Tensor | None = token_types(config, tokens)
    cache, past = Cache(config, len(prompts)), 0
    last = torch.zeros_like(tokens, dtype=torch.bool)
    last[:, -1] = True
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stops = torch.tensor(list(stop), dtype=torch.long, device=device)
    for _ in range(max_new_tokens):
        positions = torch.arange(past, past + tokens.shape[1], device=device)
        inputs = make_inputs(
            config,
            tokens,
            positions=(positions[None, :] - padding[:, None]).clamp_min(0),
            supervised=last,
            media=media,
            masks=cache_masks(config, past, tokens.shape[1], padding, types_BS),
        )
        hidden = model.run(inputs, cache)
        past += tokens.shape[1]
        # On the CPU, where every operation has a deterministic form.
        choice = sample(upcast(model.logits(hidden)).cpu(), sampling).to(device)
        yield choice.tolist()
        done |= torch.isin(choice, stops)
        if bool(done.all()):
            return
        tokens, last = choice[:, None], torch.ones_like(choice[:, None], dtype=torch.bool)
        media = types_BS = None


def sample(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """One token per row: among the top k, the smallest set whose probability reaches top p."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    values, indices = logits_BV.div(sampling.temperature).topk(
        min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1]), dim=-1
    )
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return indices.gather(1, torch.multinomial(probabilities, 1, generator=sampling.generator))[:, 0]


def cache_masks(
    config: Gemma4Config, past: int, new: int, padding: Tensor, types_BS: Tensor | None = None
) -> dict[LayerType, AttentionMask]:
    """Masks of `new` positions after `past` cached ones; a sliding layer's keys start where its cache does.

    types_BS: token types of a prompt, whose images are seen both ways where the variant does so.
    """
    batch_size, total = len(padding), past + new
    types = torch.zeros(batch_size, total, dtype=torch.long, device=padding.device)
    if types_BS is not None:
        types[:, past:] = types_BS
    place_S = torch.arange(total, device=padding.device)
    is_token_BS = (place_S >= padding[:, None]).long()  # padding is a document of its own
    queries = (place_S[past:] + total * torch.arange(batch_size, device=padding.device)[:, None]).flatten()
    masks: dict[LayerType, AttentionMask] = {}
    for layer_type, whole in layer_masks(config, types, is_token_BS).items():
        mask = whole.select(queries)
        dropped = max(0, past - (config.sliding_window - 1)) if layer_type == "sliding_attention" else 0
        masks[layer_type] = replace(
            mask,
            position_T=mask.position_T - dropped,
            first_key_T=mask.first_key_T - dropped,
            last_key_T=mask.last_key_T - dropped,
            num_keys=total - dropped,
        )
    return masks


def _until_stop(tokens: list[int], stop: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop:
            return tokens[: index + 1]
    return tokens
