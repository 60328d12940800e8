"""Multiply-adds of a decoder layer, from which operations are counted and a pipeline is cut."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from model.config import Gemma4Config


class LayerCosts(NamedTuple):
    """Multiply-adds of products, by what they are made for."""

    key: int
    """For each token whose keys and values the layer makes."""
    query: int
    """For each token that goes through the layer: query and output, feed-forward, active experts, per-layer input."""
    pair: int
    """For each visible (query, key) pair: its score, and its share of the output."""


@cache  # asked for in every micro-batch of a run
def layer_costs(config: Gemma4Config, index: int) -> LayerCosts:
    """Costs of one layer, by the formulas of docs/gemma4.md 3, 5 and 6."""
    D, N, P = config.hidden_size, config.num_attention_heads, config.hidden_size_per_layer_input
    layer = config.layer(index)
    key = 0 if layer.is_kv_consumer else D * layer.num_kv_heads * layer.head_dim * (1 if layer.k_eq_v else 2)
    query = 2 * D * N * layer.head_dim + 3 * D * layer.intermediate_size + 3 * D * P
    if config.moe is not None:
        query += D * config.moe.num_experts + 3 * D * config.moe.intermediate_size * config.moe.top_k
    return LayerCosts(key, query, 2 * N * layer.head_dim)
