"""The shapes that a step is measured at: a small decoder of each kind, at the real vocabulary."""

from __future__ import annotations

from typing import Any

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


def batch(config: Gemma4Config, length: int, share: float) -> tuple[Tensor, Tensor]:
    """Tokens [1, S], and which positions [1, S] have a supervised next token: the last `share` of them."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(3, config.vocab_size, (1, length), generator=generator)
    keep = torch.zeros(1, length, dtype=torch.bool)
    keep[:, length - 1 - round(share * (length - 1)) : -1] = True
    return tokens, keep
