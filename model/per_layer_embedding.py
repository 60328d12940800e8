"""Per-layer embeddings (E2B, E4B): a second vocabulary table whose row holds one vector per layer.

`ple = (rms(x0 @ Wm^T * D^-1/2) + T[ids] * sqrt(P)) / sqrt(2)`, one slice for each layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.norm import RMSNorm


def per_layer_inputs(
    tokens_T: Tensor,
    x_TD: Tensor,
    table: nn.Module,
    projection: nn.Linear,
    norm: RMSNorm,
    num_layers: int,
    supervised: Tensor | None,
    first_supervised_layer: int,
) -> tuple[Tensor, ...]:
    """One [T, P] per layer; layers from `first_supervised_layer` on get the supervised rows only.

    `x_TD` is the embedded stream after media were scattered in.
    """
    width = norm.dim
    token_TLP = scaled_embedding(tokens_T, table, width).unflatten(-1, (num_layers, width))
    if supervised is None:
        first_supervised_layer = num_layers
    split = (first_supervised_layer, num_layers - first_supervised_layer)
    parts: list[Tensor] = []
    for weight, token, count in zip(
        projection.weight.split([n * width for n in split]), token_TLP.split(split, dim=1), split, strict=True
    ):
        if count == 0:
            continue
        rows = supervised if parts or first_supervised_layer == 0 else None
        x, token = (x_TD, token) if rows is None else (x_TD[rows], token[rows])
        context = F.linear(x, weight) * x.shape[-1] ** -0.5
        context = norm(context.unflatten(-1, (count, width)))
        parts.extend(((context + token) * 2**-0.5).unbind(dim=1))
    return tuple(parts)


def scaled_embedding(tokens_T: Tensor, table: nn.Module, width: int) -> Tensor:
    """Rows of the table times sqrt(width), the factor rounded to the table's dtype first."""
    rows = table(tokens_T)
    return rows * torch.tensor(width**0.5, dtype=rows.dtype).item()
