"""Best fit of whole documents."""

from __future__ import annotations

import numpy as np
import pytest

from data.corpus.packing import BestFit, Split, best_fit
from data.corpus.shards import ShardError


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


def test_best_fit_of_texts_cuts_long_ones_only_and_uses_each_token_once() -> None:
    random = np.random.default_rng(1)
    lengths = np.concatenate([random.integers(1, 40, 300), random.integers(40, 700, 40), [64, 128, 1]])
    packed, split = BestFit(lengths, 64, seed=3), Split(lengths, 64, seed=3)
    orders = set()
    for _ in range(3):
        shuffled = random.permutation(len(lengths))
        pieces_of = packed.epoch(shuffled)
        rows = [pieces_of(row) for row in range(packed.sequences_per_epoch)]
        assert all(sum(piece.stop - piece.start for piece in row) <= 64 for row in rows)
        pieces = sorted(piece for row in rows for piece in row)
        wanted = [(d, start, min(start + 64, n)) for d, n in enumerate(lengths.tolist()) for start in range(0, n, 64)]
        assert pieces == wanted, "every token once; only documents beyond a sequence are cut, at its multiples"
        orders.add(tuple(piece.document for row in rows for piece in row))
    assert len(orders) == 3, "another order in each epoch"
    assert 0 < packed.padding < 0.03 and split.padding == 0
    assert packed.padding == pytest.approx(1 - lengths.sum() / (64 * packed.sequences_per_epoch))
    with pytest.raises(ShardError, match="the corpus is empty"):
        BestFit(np.zeros(3, dtype=np.int64), 64, 0)
