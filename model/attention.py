"""Gemma 4 attention: grouped queries, q/k norm, weightless v norm, no score scale, shared keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from model.attention_kernels import attention
from model.config import Gemma4Config, LayerConfig
from model.masks import AttentionMask
from model.norm import RMSNorm
from model.rope import RotaryTable, apply_rotary


class KeyValue(NamedTuple):
    """Normed and rotated keys and normed values of one layer, [T, K, H] each, T = B * S positions."""

    k_TKH: Tensor
    v_TKH: Tensor


class Attention(nn.Module):
    """A KV producer has k_proj (and v_proj unless K = V); a consumer only q_proj and o_proj.

    `kernel` attends; `exchange` gives what queries see for the keys and values made here. A plan
    that cuts sequences among devices sets both.
    """

    v_proj: nn.Linear | None
    kernel: Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]
    exchange: Callable[[KeyValue, AttentionMask], KeyValue] | None

    def __init__(self, config: Gemma4Config, layer: LayerConfig) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.kernel, self.exchange = attention, None
        D, H, eps = config.hidden_size, layer.head_dim, config.rms_norm_eps
        self.q_proj = nn.Linear(D, config.num_attention_heads * H, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * H, D, bias=False)
        self.q_norm = RMSNorm(H, eps)
        if not layer.is_kv_consumer:
            self.k_proj = nn.Linear(D, layer.num_kv_heads * H, bias=False)
            self.v_proj = None if layer.k_eq_v else nn.Linear(D, layer.num_kv_heads * H, bias=False)
            self.k_norm = RMSNorm(H, eps)
            self.v_norm = RMSNorm(H, eps, with_scale=False)

    def key_value(self, x_TD: Tensor, table: RotaryTable, mask: AttentionMask) -> KeyValue:
        """Keys and values of all positions that the queries of `mask` may see."""
        raw_k = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        raw_v = raw_k if self.v_proj is None else self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        made = KeyValue(apply_rotary(self.k_norm(raw_k), table), self.v_norm(raw_v))
        return made if self.exchange is None else self.exchange(made, mask)

    def forward(self, x_TD: Tensor, key_value: KeyValue, table: RotaryTable, mask: AttentionMask) -> Tensor:
        """Output [T, D] of the T queries of `mask` against the keys of all positions."""
        q_TNH = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        out_TNH = self.kernel(apply_rotary(q_TNH, table), *key_value, mask)
        return self.o_proj(out_TNH.flatten(1))
