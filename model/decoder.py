"""The decoder: sandwich-normed layers over flat tokens [T, D], and the loop that hands them what they share.

What crosses from one layer to another is a returned tensor: the hidden states, and the keys and
values that KV consumers read from the last producer of their own type (docs/gemma4.md 3.3).

    tokens ─embed─▶ x [T, D] ─ layers 0 … prune_from ─▶ kept positions x [t, D] ─ later layers ─▶ norm ─▶ head
               └─ per-layer inputs [T, P] ─────────────────────────▶ [t, P]
                        keys and values of the last producer of each type ─────────▶ its consumers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from model.attention import Attention, KeyValue
from model.config import Gemma4Config, LayerConfig, LayerType
from model.inputs import Inputs, Kept
from model.linear import Linear
from model.masks import AttentionMask
from model.mlp import MLP, gated_gelu
from model.moe import Experts, Router
from model.norm import RMSNorm
from model.rope import RotaryTable, rotary_table


class KeyValueCache(Protocol):
    """Keeps the keys and values of earlier tokens, for decoding."""

    def store(self, layer: int, new: KeyValue) -> KeyValue:
        """Keep a layer's new keys and values; returns all that its queries see."""
        ...


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer of one attention type gets alike: rotary angles and masks, built once per batch.

    Keys are made at the positions of `rope_k`; queries run at those of `rope_q`, which are all of
    them or, from the last KV producer on, only the kept ones.
    """

    rope_k: RotaryTable
    rope_q: RotaryTable
    mask: AttentionMask


class DecoderLayer(nn.Module):
    """One decoder layer (docs/gemma4.md 2.3); the buffer `layer_scalar` multiplies the hidden states at its end."""

    layer_scalar: Tensor
    experts: nn.Module

    def __init__(self, config: Gemma4Config, spec: LayerConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.spec = spec
        self.self_attn = Attention(config, spec)
        self.mlp = MLP(D, spec.intermediate_size)
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
            self.per_layer_input_gate = Linear(D, P)
            self.per_layer_projection = Linear(P, D)
            self.post_per_layer_input_norm = RMSNorm(D, eps)

    def forward(
        self,
        x_TD: Tensor,
        per_layer_input_TP: Tensor | None,
        inputs: AttentionInputs,
        shared: KeyValue | None = None,
        kept: Kept | None = None,
        kv_cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Hidden states at the query positions, and the keys and values, if other layers read them.

        `kept` are the positions to go on with after keys and values were made of all;
        `per_layer_input_TP` holds the query positions only.
        """
        normed = self.input_layernorm(x_TD)
        if shared is None:
            key_value = self.self_attn.key_value(normed, inputs.rope_k, inputs.mask)
            if kv_cache is not None:
                key_value = kv_cache.store(self.spec.index, key_value)
        else:
            key_value = shared
        if kept is not None:
            # Two ways, since a plan may split x among devices, but gives this layer's products all of `normed`.
            x_TD, normed = kept.take(x_TD), normed[kept.index]
        attended = self.self_attn(normed, key_value, inputs.rope_q, inputs.mask)
        x_TD = self.post_attention_layernorm.add_to(x_TD, attended)
        x_TD = self.post_feedforward_layernorm.add_to(x_TD, self._feed_forward(x_TD))
        if per_layer_input_TP is not None:
            gated = gated_gelu(self.per_layer_input_gate(x_TD), per_layer_input_TP)
            x_TD = self.post_per_layer_input_norm.add_to(x_TD, self.per_layer_projection(gated))
        return x_TD * self.layer_scalar.to(x_TD.dtype), key_value if self.spec.kv_is_shared else None

    def _feed_forward(self, x_TD: Tensor) -> Tensor:
        def dense_branch() -> Tensor:
            return self.mlp(self.pre_feedforward_layernorm(x_TD))

        if not self.has_experts:
            return dense_branch()
        weights, indices = self.router(x_TD)
        routed, dense = self.experts(self.pre_feedforward_layernorm_2(x_TD), weights, indices, dense_branch)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)


def decode(
    config: Gemma4Config,
    layers: Sequence[DecoderLayer],
    x_TD: Tensor,
    per_layer: Mapping[int, Tensor] | None,
    inputs: Inputs,
    received: Mapping[LayerType, KeyValue] | None = None,
    kv_cache: KeyValueCache | None = None,
) -> tuple[Tensor, dict[LayerType, KeyValue]]:
    """Run a model's layers, or some of them in a row: hidden states, and the keys and values that later layers read.

    `received` are those that layers before these made.
    """
    shared, prune_from = dict(received or {}), max(first_pruned(config), layers[0].spec.index)
    whole, pruned = _attention_inputs(config, inputs, x_TD.dtype)
    for layer in layers:
        spec = layer.spec
        x_TD, key_value = layer(
            x_TD,
            per_layer[spec.index] if per_layer is not None else None,
            (pruned if inputs.kept is not None and spec.index >= prune_from else whole)[spec.type],
            shared[spec.type] if spec.is_kv_consumer else None,
            inputs.kept if spec.index == prune_from else None,
            kv_cache,
        )
        if key_value is not None:
            shared[spec.type] = key_value
    return x_TD, shared


def first_pruned(config: Gemma4Config) -> int:
    """The layer in which only kept positions go on: the last that makes keys and values.

    No layer after it reads another position, whose queries, feed-forward and per-layer input
    therefore reach nothing and are not computed (docs/gemma4.md 7.3).
    """
    return config.first_kv_shared_layer - 1


def _attention_inputs(
    config: Gemma4Config, inputs: Inputs, dtype: torch.dtype
) -> tuple[dict[LayerType, AttentionInputs], dict[LayerType, AttentionInputs]]:
    """What layers of each attention type get, before and after pruning."""
    whole: dict[LayerType, AttentionInputs] = {}
    pruned: dict[LayerType, AttentionInputs] = {}
    for layer_type, mask in inputs.masks.items():
        rope = rotary_table(config, layer_type, inputs.positions_T, dtype)
        whole[layer_type] = AttentionInputs(rope, rope, mask)
        if inputs.kept is not None:
            kept = inputs.kept
            pruned[layer_type] = AttentionInputs(rope, rope.select(kept.index), kept.masks[layer_type])
    return whole, pruned
