"""The decoder: sandwich-normed layers over flat tokens [T, D], and the loop that hands them what they share.

What crosses from one layer to another is a returned tensor: the stream, and the keys and
values that KV consumers read from the last producer of their own type (docs/gemma4.md 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention, KeyValue, RawKeyValue
from model.config import Gemma4Config, LayerConfig, LayerType
from model.masks import AttentionMask
from model.mlp import MLP
from model.moe import Experts, Router
from model.norm import RMSNorm
from model.rope import RotaryTable
from model.stream import Rows

KeyValueStore = Callable[[int, KeyValue], KeyValue]
"""Called with a producer's index and new keys and values; returns those its queries see (a cache adds the past)."""


@dataclass(frozen=True)
class LayerContext:
    """What every layer of one attention type gets alike: rotary angles and masks, built once per batch.

    Keys are made at `key_table`'s positions; queries run at `query_table`'s, which are all of
    them or, from the last KV producer on, only the supervised ones.
    """

    key_table: RotaryTable
    query_table: RotaryTable
    mask: AttentionMask


class DecoderLayer(nn.Module):
    """One decoder layer (docs/gemma4.md 2.3); the buffer `layer_scalar` multiplies the whole stream at its end."""

    layer_scalar: Tensor
    experts: nn.Module

    def __init__(self, config: Gemma4Config, layer: LayerConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.layer = layer
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(D, layer.intermediate_size)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.has_experts = config.enable_moe_block
        if self.has_experts:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = RMSNorm(D, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(D, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(D, eps)
        self.has_per_layer_input = config.hidden_size_per_layer_input > 0
        if self.has_per_layer_input:
            P = config.hidden_size_per_layer_input
            self.per_layer_input_gate = nn.Linear(D, P, bias=False)
            self.per_layer_projection = nn.Linear(P, D, bias=False)
            self.post_per_layer_input_norm = RMSNorm(D, eps)

    def forward(
        self,
        x_TD: Tensor,
        per_layer_input_TP: Tensor | None,
        context: LayerContext,
        shared: KeyValue | None = None,
        queries: Rows | None = None,
        store: KeyValueStore | None = None,
    ) -> tuple[Tensor, KeyValue | None]:
        """New stream at the query positions, and the keys and values made, if other layers read them.

        `queries` are rows of x to go on with after keys and values were made of all;
        `per_layer_input_TP` holds the query rows only.
        """
        normed = self.input_layernorm(x_TD)
        key_value: KeyValue | RawKeyValue
        if shared is None:
            key_value = self.self_attn.key_value(normed, context.key_table, context.mask)
            if store is not None:
                assert isinstance(key_value, KeyValue)
                key_value = store(self.layer.index, key_value)
        else:
            key_value = shared
        if queries is not None:
            x_TD, normed = queries.take(x_TD), normed[queries.index]
        attended = self.self_attn(normed, key_value, context.query_table, context.mask)
        x_TD = x_TD + self.post_attention_layernorm(attended)
        x_TD = x_TD + self.post_feedforward_layernorm(self._feed_forward(x_TD))
        if per_layer_input_TP is not None:
            gate = F.gelu(self.per_layer_input_gate(x_TD), approximate="tanh")
            x_TD = x_TD + self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer_input_TP))
        made = key_value if self.layer.kv_is_shared and isinstance(key_value, KeyValue) else None
        return x_TD * self.layer_scalar.to(x_TD.dtype), made

    def _feed_forward(self, x_TD: Tensor) -> Tensor:
        dense = self.mlp(self.pre_feedforward_layernorm(x_TD))
        if not self.has_experts:
            return dense
        weights, indices = self.router(x_TD)
        routed = self.experts(self.pre_feedforward_layernorm_2(x_TD), weights, indices)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)


def decode(
    layers: Iterable[nn.Module],
    x_TD: Tensor,
    per_layer_inputs: Mapping[int, Tensor] | Sequence[Tensor] | None,
    contexts: dict[LayerType, LayerContext],
    narrowed_contexts: dict[LayerType, LayerContext],
    rows: Rows | None,
    narrow_at: int,
    received: Mapping[LayerType, KeyValue] | None = None,
    store: KeyValueStore | None = None,
) -> tuple[Tensor, dict[LayerType, KeyValue]]:
    """Run the layers: the new stream, and by type the keys and values that later layers read.

    `received` are those that layers before these made. With `rows`, the stream narrows to them at layer
    `narrow_at`, which is the last layer whose keys are read, or a later one. No layer after it makes keys
    or values, so another position's stream past that point reaches nothing: its queries, feed-forward and
    per-layer input are not computed (docs/gemma4.md 7.3).
    """
    shared = dict(received or {})
    for layer in layers:
        config = cast(LayerConfig, layer.layer)
        narrowed = rows is not None and config.index >= narrow_at
        x_TD, key_value = layer(
            x_TD,
            per_layer_inputs[config.index] if per_layer_inputs is not None else None,
            (narrowed_contexts if narrowed else contexts)[config.type],
            shared[config.type] if config.is_kv_consumer else None,
            rows if config.index == narrow_at else None,
            store,
        )
        if key_value is not None:
            shared[config.type] = key_value
    return x_TD, shared
