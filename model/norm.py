"""RMSNorm as Gemma 4 has it: plain weight (not 1 + w), all of it in float32, one cast back (docs/gemma4.md 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.precision import upcast


class RMSNorm(nn.Module):
    """`y = x * (mean(x^2) + eps)^(-1/2) * w` over the last dim; `with_scale=False` has no w."""

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float, *, with_scale: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if with_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of root mean square 1 along the last axis, times the weight; in the dtype of x."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """`RMSNorm` with a weight from elsewhere, or none; in the dtype of x."""
    weight = None if weight_D is None else upcast(weight_D)
    return F.rms_norm(upcast(x), x.shape[-1:], weight, eps).to(x.dtype)
