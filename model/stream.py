"""The flat stream of tokens [T, D]: which rows go on, and where the soft tokens of media are put."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of the stream that are wanted: sorted places `index`, the first `count` of them real.

    A plan that deals rows to ranks may pad `index` and take rows from other ranks.
    """

    index: Tensor
    count: int

    def take(self, x_TD: Tensor) -> Tensor:
        return x_TD[self.index]


class Stream:
    """Rows of a stream that lies whole on this device."""

    def rows(self, supervised_BS: Tensor) -> Rows:
        index = supervised_BS.flatten().nonzero()[:, 0]
        return Rows(index, len(index))

    def place(self, x_TD: Tensor, rows: Tensor, features: Tensor) -> Tensor:
        """The stream with `features` in place of `rows`; a row of -1 is on another device."""
        here = rows >= 0
        return x_TD.index_copy(0, rows[here], features[here].to(x_TD.dtype))
