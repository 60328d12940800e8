"""Datasets mixed by weight, as a pure function of the sequence's index.

Weights are whole parts of a period: of parts (3, 1) three sequences in four belong to the first dataset. Inside a
period the earliest due comes first: sequence j of a dataset with `a` of `p` parts may come from place floor(j p / a) on
and is due before ceil((j + 1) p / a). The windows can always be kept, and in them every dataset's share of any first
n sequences is within one of n a / p.

Where weights change or a dataset has reached its limit, a new stage begins with periods of its own; each dataset goes
on where it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np
from torch.utils.data import Dataset

from data.batch import Row
from model import ConfigError

_LONGEST_PERIOD = 100_000


def whole_parts(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of these weights, which are read as the decimals they print as.

    Raises `ConfigError` for one below 0, and for a ratio of very large numbers.
    """
    wrong = next((weight for weight in weights if not 0 <= weight < float("inf")), None)
    if wrong is not None:
        raise ConfigError(f"data.sources has a weight of {wrong}; give 0 or a number above.")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    parts = [part // max(gcd(*parts), 1) for part in parts]
    if sum(parts) > _LONGEST_PERIOD:
        raise ConfigError(
            f"data.sources has weights {', '.join(map(str, weights))}, which come out even only after {sum(parts):,} "
            f"sequences; give rounder ones, that do after at most {_LONGEST_PERIOD:,}."
        )
    return parts


def shares_by_size(weights: Sequence[float], tokens: Sequence[int], temperature: float) -> list[float]:
    """Weights times sizes to the power 1 / temperature, as shares in thousandths: 1 is by size, larger is more even."""
    shares = [weight * size ** (1 / temperature) for weight, size in zip(weights, tokens, strict=True)]
    return [max(round(1000 * share / sum(shares)), 1) if share else 0 for share in shares]


@dataclass(frozen=True)
class Stage:
    """From sequence `first` of the run on, weights of the sources; one of weight 0 is left out."""

    first: int
    weights: Sequence[float]


@dataclass(frozen=True)
class _Stretch:
    """Sequences from `first` on, of which the sources have these parts; `used` are how many each gave before."""

    first: int
    parts: tuple[int, ...]
    used: tuple[int, ...]

    def counts(self, index: int) -> tuple[int, ...]:
        """How many sequences each source has given before sequence `index`."""
        turns, _ = _period(self.parts)
        periods, place = divmod(index - self.first, len(turns))
        counts = [used + periods * part for used, part in zip(self.used, self.parts, strict=True)]
        for source in np.flatnonzero(self.parts).tolist():
            counts[source] += int(np.count_nonzero(turns[:place] == source))
        return tuple(counts)

    def end(self, source: int, limit: int) -> int:
        """The first sequence before which a source has given `limit` sequences."""
        turns, earlier = _period(self.parts)
        periods, number = divmod(limit - self.used[source] - 1, self.parts[source])
        place = int(np.flatnonzero((turns == source) & (earlier == number))[0])
        return self.first + periods * len(turns) + place + 1


class Turns:
    """Whose turn each sequence of a run is.

    limits: most sequences that a source gives, None for any number. `since` is the sequence from which this holds, and
    `used` what each source gave before it: how a run goes on that was mixed otherwise.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        limits: Sequence[int | None] | None = None,
        since: int = 0,
        used: Sequence[int] | None = None,
    ) -> None:
        count = len(stages[0].weights)
        self.stages, self.limits, self.since = stages, limits or [None] * count, since
        self.length: int | None = None
        """Sequences of the run after which every source has reached its limit; None if one has none."""
        self._used = tuple(used or [0] * count)
        self._stretches = self._cut(self._used)

    def _cut(self, used: tuple[int, ...]) -> list[_Stretch]:
        stretches: list[_Stretch] = []
        begins = [max(stage.first, self.since) for stage in self.stages]
        ends: list[int | None] = [*begins[1:], None]
        for stage, first, end in zip(self.stages, begins, ends, strict=True):
            while end is None or first < end:
                left = [limit is None or given < limit for limit, given in zip(self.limits, used, strict=True)]
                parts = whole_parts([w if more else 0 for w, more in zip(stage.weights, left, strict=True)])
                if not any(parts):
                    self.length = first
                    return stretches
                stretch = _Stretch(first, tuple(parts), used)
                stretches.append(stretch)
                reached = [
                    stretch.end(source, limit) for source, limit in enumerate(self.limits) if limit and parts[source]
                ]
                stop = min([*reached, *([] if end is None else [end])], default=None)
                if stop is None:
                    break
                first, used = stop, stretch.counts(stop)
        return stretches

    def _at(self, index: int) -> _Stretch:
        place = bisect_right([stretch.first for stretch in self._stretches], index) - 1
        return self._stretches[max(place, 0)]

    def locate(self, index: int) -> tuple[int, int]:
        """The source that sequence `index` belongs to, and how many earlier ones did."""
        stretch = self._at(index)
        turns, earlier = _period(stretch.parts)
        periods, place = divmod(index - stretch.first, len(turns))
        source = int(turns[place])
        return source, stretch.used[source] + periods * stretch.parts[source] + int(earlier[place])

    def counts(self, index: int) -> tuple[int, ...]:
        """How many of the run's first `index` sequences each source gives, those before `since` too."""
        return self._at(index).counts(index) if self._stretches else self._used


class Mixture(Dataset[Row]):
    """`mixture[i]` is sequence i of the run: the next one, by its own order, of the dataset whose turn it is."""

    def __init__(self, datasets: Sequence[Dataset[Row]], turns: Turns) -> None:
        self.datasets, self.turns = datasets, turns

    def __getitem__(self, index: int) -> Row:
        source, index = self.turns.locate(index)
        return replace(self.datasets[source][index], source=source)


@lru_cache(maxsize=64)
def _period(parts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn each place of a period is, and how many places before it are the same's."""
    length, counts = sum(parts), [0] * len(parts)
    turns, earlier = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    for place in range(length):
        due = [
            (-(-(count + 1) * length // part), source)
            for source, (part, count) in enumerate(zip(parts, counts, strict=True))
            if part and count * length // part <= place
        ]
        source = min(due)[1]
        turns[place], earlier[place] = source, counts[source]
        counts[source] += 1
    return turns, earlier
