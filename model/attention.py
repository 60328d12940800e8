"""Gemma 4 attention: grouped queries, q/k norm, weightless v norm, no score scale, shared keys and values.

Its formulas are in docs/gemma4.md 3.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from model.attention_kernels import attention
from model.config import Gemma4Config, LayerConfig
from model.linear import Linear
from model.masks import AttentionMask
from model.norm import RMSNorm, rms_norm
from model.rope import RotaryTable, norm_rotary


class KeyValue(NamedTuple):
    """Keys and values of one layer, [T, K, H] each: normed, and keys rotated, unless called raw."""

    k_TKH: Tensor
    v_TKH: Tensor


def normed_key_value(raw: KeyValue, weight_H: Tensor | None, table: RotaryTable, eps: float) -> KeyValue:
    """Keys and values at the positions of `table` (docs/gemma4.md 3.1); `weight_H` is that of the key norm."""
    return KeyValue(norm_rotary(raw.k_TKH, weight_H, table, eps), rms_norm(raw.v_TKH, None, eps))


class AttentionPlan(Protocol):
    """How a layer attends where keys and values of other devices are to be seen."""

    def key_value(self, layer: Attention, raw: KeyValue, table: RotaryTable, mask: AttentionMask) -> KeyValue:
        """Keys and values as `attend` and later layers take them; raw are the outputs of `k_proj` and `v_proj`."""
        ...

    def attend(self, layer: Attention, q_TNH: Tensor, key_value: KeyValue, mask: AttentionMask) -> Tensor:
        """Outputs [T_queries, N, H] of the queries here over all keys they see, wherever those are."""
        ...


class Attention(nn.Module):
    """Attention of one layer (docs/gemma4.md 3.1 to 3.3): only a KV producer has k_proj, and v_proj unless K = V."""

    v_proj: Linear | None
    plan: AttentionPlan | None

    def __init__(self, config: Gemma4Config, layer: LayerConfig) -> None:
        super().__init__()
        self.head_dim, self.eps, self.plan = layer.head_dim, config.rms_norm_eps, None
        D, H, eps = config.hidden_size, layer.head_dim, config.rms_norm_eps
        self.q_proj = Linear(D, config.num_attention_heads * H)
        self.o_proj = Linear(config.num_attention_heads * H, D)
        self.q_norm = RMSNorm(H, eps)
        if not layer.is_kv_consumer:
            self.k_proj = Linear(D, layer.num_kv_heads * H)
            self.v_proj = None if layer.k_eq_v else Linear(D, layer.num_kv_heads * H)
            self.k_norm = RMSNorm(H, eps)

    def key_value(self, x_TD: Tensor, table: RotaryTable, mask: AttentionMask) -> KeyValue:
        """Keys and values of these tokens; with a plan, as its `attend` takes them."""
        raw_k = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        raw_v = raw_k if self.v_proj is None else self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        raw = KeyValue(raw_k, raw_v)
        return self.normed(raw, table) if self.plan is None else self.plan.key_value(self, raw, table, mask)

    def normed(self, raw: KeyValue, table: RotaryTable) -> KeyValue:
        """Keys and values of the raw products."""
        return normed_key_value(raw, self.k_norm.weight, table, self.eps)

    def forward(self, x_TD: Tensor, key_value: KeyValue, table: RotaryTable, mask: AttentionMask) -> Tensor:
        """Output [T, D] of the T queries of `mask` against the keys of all positions."""
        q_TNH = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_TNH = norm_rotary(q_TNH, self.q_norm.weight, table, self.eps)
        if self.plan is None:
            out_TNH = attention(q_TNH, *key_value, mask)
        else:
            out_TNH = self.plan.attend(self, q_TNH, key_value, mask)
        return self.o_proj(out_TNH.flatten(1))
