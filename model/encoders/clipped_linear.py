"""The linear map of the towers: bias-free, and in E2B and E4B between two clamps whose bounds come with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BOUNDS = {
    "input_min": -float("inf"),
    "input_max": float("inf"),
    "output_min": -float("inf"),
    "output_max": float("inf"),
}
"""The four scalar buffers of a clipped linear and their values before any checkpoint is read."""


class ClippedLinear(nn.Module):
    """`clamp(W clamp(x))` (docs/gemma4.md 8.1); the bounds are persistent buffers, not trained."""

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, in_features: int, out_features: int, clipped: bool) -> None:
        super().__init__()
        self.clipped = clipped
        self.linear = nn.Linear(in_features, out_features, bias=False)
        if clipped:
            for name, value in BOUNDS.items():
                self.register_buffer(name, torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        """The linear map, its input and output clipped to the stored bounds if there are any."""
        if not self.clipped:
            return self.linear(x)
        y = self.linear(_clamp(x, self.input_min, self.input_max))
        return _clamp(y, self.output_min, self.output_max)


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(x, low.to(x.dtype), high.to(x.dtype))
