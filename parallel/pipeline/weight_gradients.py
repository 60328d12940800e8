"""Weight gradients made later than input gradients, for a zero-bubble pipeline.

A stage whose input gradients are ready can let the stage before it go on, and make its own weight
gradients (about half of a backward's products) while it would otherwise wait. The dense products of
the decoder layers are deferred so; experts, norms and the head make theirs at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import Linear
from parallel.pipeline.stage import Gemma4Stage


class WeightGradients:
    """Weight gradients that the backward passes of one stage have left to make."""

    def __init__(self) -> None:
        self._left: list[tuple[Tensor, Tensor, Tensor]] = []

    def product(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        """The product of `F.linear`, whose backward leaves the weight's gradient for later."""
        return _Product.apply(x_TD, weight, self)

    def leave(self, weight: Tensor, grad: Tensor, x_TD: Tensor) -> None:
        """Keep what a weight's gradient is made of until it is asked for."""
        self._left.append((weight, grad, x_TD))

    def take(self) -> Callable[[], None]:
        """What makes all that are left now, and adds them to the parameters' gradients."""
        left, self._left = self._left, []

        def make() -> None:
            for weight, grad, x_TD in left:
                torch.autograd.backward([weight], [grad.T @ x_TD])

        return make


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(x_TD)
        # Kept as it is: recomputation would give back a copy that leads to no parameter.
        ctx.weight, ctx.later = weight, later
        return F.linear(x_TD, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x_TD,) = ctx.saved_tensors
        if ctx.weight.requires_grad:
            ctx.later.leave(ctx.weight, grad, x_TD.detach())
        return grad @ ctx.weight.detach(), None, None


def defer_weight_gradients(stage: Gemma4Stage) -> WeightGradients:
    """Let the dense layers of a stage on `meta` leave their weight gradients."""
    later = WeightGradients()
    for layer in stage.layers:
        for module in layer.modules():
            if isinstance(module, Linear):
                assert module.product is F.linear, "only the plain product can be deferred"
                module.product = later.product
    return later
