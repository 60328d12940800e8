"""The gated feed-forward block: down(gelu_tanh(gate(x)) * up(x)), no biases (docs/gemma4.md 5.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.linear import Linear
from model.triton_choice import by_triton


class MLP(nn.Module):
    """Gated feed-forward of a decoder layer (docs/gemma4.md 5)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Features [T, D] of each token, through the gate."""
        return self.down_proj(gated_gelu(self.gate_proj(x_TD), self.up_proj(x_TD)))


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, of any two tensors of one shape."""
    if by_triton(gate):
        from model.kernels.gate import fused_gated_gelu

        return fused_gated_gelu(gate, up)
    return F.gelu(gate, approximate="tanh") * up
