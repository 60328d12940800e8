"""Best fit of whole documents."""

from __future__ import annotations

import numpy as np
import pytest

from data.corpus.packing import best_fit


@pytest.mark.parametrize("draw", ["exponential", "lognormal", "uniform"])
def test_rows_are_full_and_never_too_full(draw: str) -> None:
    random = np.random.default_rng(0)
    drawn = {
        "exponential": random.exponential(512, 5000),
        "lognormal": random.lognormal(5.9, 0.87, 5000),
        "uniform": random.uniform(2, 1024, 5000),
    }[draw]
    sizes = np.clip(drawn.astype(np.int64) + 2, 2, 4096)
    rows = best_fit(sizes, 4096, random.permutation(len(sizes)))
    filled = [int(sizes[row].sum()) for row in rows]
    assert max(filled) <= 4096 and sorted(place for row in rows for place in row) == list(range(5000))
    assert sum(filled) / (4096 * len(rows)) > 0.98
    assert best_fit(np.array([5, 7, 3, 5, 9]), 10, np.arange(5)) == [[0, 3], [1, 2], [4]]
