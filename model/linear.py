"""The linear layer of the decoder, in parts that can be set one by one.

    y = after(product(x, read(weight)) + adapter(x))

Whatever changes a layer sets a part and leaves the others: nothing that a layer carries is lost when it is split
among devices, computed in another number format, or given an adapter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor], Tensor]
"""The product of x [T, in-features] and a weight [out-features, in-features], as `F.linear` makes it."""


class Linear(nn.Linear):
    """A linear map without bias, under the parameter name `weight`."""

    product: Product
    """How x and the weight are multiplied."""
    read: Callable[[Tensor], Tensor] | None
    """What of the weight is multiplied here; None for all of it."""
    adapter: nn.Module | None
    """Added to the product, of the same x: `b(a(x))`, of two linear layers that it has under these names."""
    after: Callable[[Tensor], Tensor] | None
    """What becomes of the sum."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.product, self.read, self.adapter, self.after = F.linear, None, None, None

    def local_weight(self) -> Tensor:
        """The weight, or what of it is multiplied here."""
        return self.weight if self.read is None else self.read(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The product with this device's part of the weight, the adapter's added."""
        out = self.product(x_TD, self.local_weight())
        if self.adapter is not None:
            out = out + self.adapter(x_TD)
        return out if self.after is None else self.after(out)
