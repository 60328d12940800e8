"""The shapes that a step is measured at: a small decoder of each kind, at the real vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import Gemma4Config


def _shape(**sizes: Any) -> Gemma4Config:
    return Gemma4Config(
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        global_head_dim=128,
        sliding_window=256,
        sliding_window_pattern=5,
        **sizes,
    )


SHAPES: dict[str, Gemma4Config] = {
    "e_like": _shape(
        intermediate_size=2048,
        num_hidden_layers=15,
        num_key_value_heads=1,
        num_kv_shared_layers=8,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
    ),
    "dense": _shape(
        intermediate_size=2048,
        num_hidden_layers=15,
        num_key_value_heads=4,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
    ),
    "moe": _shape(
        intermediate_size=1024,
        num_hidden_layers=5,
        num_key_value_heads=4,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=64,
        top_k_experts=8,
        moe_intermediate_size=256,
    ),
}
"""E-like: layers that share keys and values, double-wide, per-layer inputs; dense: K = V; moe: 64 experts, 8 of them
active."""


class Batch(NamedTuple):
    """One row [1, S]: tokens, whether the next token is supervised, and positions in the document."""

    tokens: Tensor
    keep: Tensor
    positions: Tensor

    @property
    def is_packed(self) -> bool:
        """Whether there is more than one document."""
        return int((self.positions == 0).sum()) > 1

    @property
    def documents(self) -> Tensor:
        """The document [1, S] of each token."""
        return (self.positions == 0).cumsum(dim=1)


def batch(config: Gemma4Config, length: int, share: float, documents: int = 1) -> Batch:
    """Documents end to end, of one length but for the last; the last `share` of the tokens of each is supervised."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(3, config.vocab_size, (1, length), generator=generator)
    keep = torch.zeros(1, length, dtype=torch.bool)
    size = -(-length // documents)
    for start in range(0, length, size):
        end = min(start + size, length)
        keep[:, end - 1 - round(share * (end - start - 1)) : end - 1] = True
    return Batch(tokens, keep, torch.arange(length)[None] % size)
