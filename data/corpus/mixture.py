"""Datasets mixed by weight, as a pure function of the sequence's index.

Weights are whole parts of a period: of parts (3, 1) three sequences in four belong to the first dataset. Inside a
period the earliest due comes first: sequence j of a dataset with `a` of `p` parts may come from place floor(j p / a) on
and is due before ceil((j + 1) p / a). The windows can always be kept, and in them every dataset's share of any first
n sequences is within one of n a / p.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from torch.utils.data import Dataset

from data.batch import Row
from model import ConfigError

_LONGEST_PERIOD = 100_000


def whole_parts(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of these weights, which are read as the decimals they print as.

    Raises `ConfigError` for one that is not above 0, and for a ratio of very large numbers.
    """
    wrong = next((weight for weight in weights if not 0 < weight < float("inf")), None)
    if wrong is not None:
        raise ConfigError(f"data.sources has a weight of {wrong}; give a number above 0.")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    parts = [part // gcd(*parts) for part in parts]
    if sum(parts) > _LONGEST_PERIOD:
        raise ConfigError(
            f"data.sources has weights {', '.join(map(str, weights))}, which come out even only after {sum(parts):,} "
            f"sequences; give rounder ones, that do after at most {_LONGEST_PERIOD:,}."
        )
    return parts


class Mixture(Dataset[Row]):
    """`mixture[i]` is sequence i of the run: the next one, by its own order, of the dataset whose turn it is."""

    def __init__(self, datasets: Sequence[Dataset[Row]], parts: Sequence[int]) -> None:
        self.datasets, self.parts = datasets, parts
        self._turns, self._earlier = _period(self.parts)

    def locate(self, index: int) -> tuple[int, int]:
        """The dataset that sequence `index` belongs to, and how many earlier ones did."""
        periods, place = divmod(index, len(self._turns))
        source = int(self._turns[place])
        return source, periods * self.parts[source] + int(self._earlier[place])

    def __getitem__(self, index: int) -> Row:
        source, index = self.locate(index)
        return self.datasets[source][index]


def _period(parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn each place of a period is, and how many places before it are the same's."""
    length, counts = sum(parts), [0] * len(parts)
    turns, earlier = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    for place in range(length):
        due = [
            (-(-(count + 1) * length // part), source)
            for source, (part, count) in enumerate(zip(parts, counts, strict=True))
            if count * length // part <= place
        ]
        source = min(due)[1]
        turns[place], earlier[place] = source, counts[source]
        counts[source] += 1
    return turns, earlier
