"""Per-layer embeddings (E2B, E4B): a second vocabulary table whose row holds one vector per layer.

`ple = (rms(x0 @ Wm^T * D^-1/2) + Table[ids] * sqrt(P)) / sqrt(2)`, one slice for each layer (docs/gemma4.md 6).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.norm import RMSNorm


def per_layer_inputs(
    rows_TC: Tensor,
    x_TD: Tensor,
    projection: nn.Linear,
    norm: RMSNorm,
    take: Callable[[Tensor], Tensor] | None,
    prune_from: int,
) -> dict[int, Tensor]:
    """Each layer's own input [T, P], of C = L * P numbers that a token has in the table.

    `x_TD` are the embedded tokens with media among them. Layers from `prune_from` on get what `take` leaves.
    """
    width = norm.dim
    num_layers = rows_TC.shape[1] // width
    if take is None:
        prune_from = num_layers
    counts = (prune_from, num_layers - prune_from)
    widths = [count * width for count in counts]
    parts: list[Tensor] = []
    for weight, token, count, pruned in zip(
        projection.weight.split(widths), rows_TC.split(widths, dim=-1), counts, (None, take), strict=True
    ):
        if count == 0:
            continue
        x, token = (x_TD, token) if pruned is None else (pruned(x_TD), pruned(token))
        context = F.linear(x, weight) * x.shape[-1] ** -0.5
        context = norm(context.unflatten(-1, (count, width)))
        parts.extend(((context + token.unflatten(-1, (count, width))) * 2**-0.5).unbind(dim=1))
    return dict(enumerate(parts))


def scaled_embedding(tokens_T: Tensor, table: nn.Module, width: int) -> Tensor:
    """Vectors of a table times sqrt(width), the factor rounded to the table's dtype first (docs/gemma4.md 2.1)."""
    vectors = table(tokens_T)
    return vectors * _root(width, vectors.dtype)


@cache
def _root(width: int, dtype: torch.dtype) -> float:
    return torch.tensor(width**0.5, dtype=dtype).item()
