"""A linear layer as plans change it, under the parameter name it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.sharded import local_part

Product = Callable[[Tensor, Tensor], Tensor]
"""The product of x [T, in-features] and a weight [out-features, in-features], as `F.linear` makes it."""


class ParallelLinear(nn.Linear):
    """Multiplies by a shard of the weight, some rows of a whole one, or all of it, by a product of its own."""

    product: Product

    def __init__(self, linear: nn.Linear, weight: nn.Parameter, rows: slice | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None  # type: ignore[assignment]
        self.weight, self.rows, self.product = weight, rows, F.linear

    def local_weight(self) -> Tensor:
        weight = local_part(self.weight)
        return weight if self.rows is None else weight[self.rows]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.product(x_TD, self.local_weight())


def with_product(parent: nn.Module, name: str) -> ParallelLinear:
    """The linear layer `name` of a module, put there as one whose product can be set."""
    linear = getattr(parent, name)
    if not isinstance(linear, ParallelLinear):
        linear = ParallelLinear(linear, cast(nn.Parameter, linear.weight))
        setattr(parent, name, linear)
    return linear
