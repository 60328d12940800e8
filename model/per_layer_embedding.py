"""Per-layer embeddings (E2B, E4B): a second vocabulary table whose row holds one vector per layer.

`ple = (rms(x0 @ Wm^T * D^-1/2) + Table[ids] * sqrt(P)) / sqrt(2)`, one slice for each layer (docs/gemma4.md 6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.norm import RMSNorm
from model.stream import Rows


def per_layer_inputs(
    tokens_T: Tensor,
    x_TD: Tensor,
    table: nn.Module,
    projection: nn.Linear,
    norm: RMSNorm,
    num_layers: int,
    rows: Rows | None,
    narrow_at: int,
) -> tuple[Tensor, ...]:
    """Per-layer inputs (docs/gemma4.md 6), one [T, P] per layer; layers from `narrow_at` on get `rows` only.

    `x_TD` is the embedded stream after media were scattered in.
    """
    width = norm.dim
    if rows is None:
        narrow_at = num_layers
    counts = (narrow_at, num_layers - narrow_at)
    widths = [count * width for count in counts]
    tokens = scaled_embedding(tokens_T, table, width).split(widths, dim=-1)
    parts: list[Tensor] = []
    for weight, token, count, wanted in zip(projection.weight.split(widths), tokens, counts, (None, rows), strict=True):
        if count == 0:
            continue
        x, token = (x_TD, token) if wanted is None else (wanted.take(x_TD), wanted.take(token))
        context = F.linear(x, weight) * x.shape[-1] ** -0.5
        context = norm(context.unflatten(-1, (count, width)))
        parts.extend(((context + token.unflatten(-1, (count, width))) * 2**-0.5).unbind(dim=1))
    return tuple(parts)


def scaled_embedding(tokens_T: Tensor, table: nn.Module, width: int) -> Tensor:
    """Rows of the table times sqrt(width), the factor rounded to the table's dtype first (docs/gemma4.md 2.1)."""
    rows = table(tokens_T)
    return rows * torch.tensor(width**0.5, dtype=rows.dtype).item()
