"""Best fit of whole documents."""

from __future__ import annotations

import numpy as np
import pytest

from data.corpus.packing import BestFit, MediaBudget, Split, Whole, best_fit
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


def test_rows_keep_within_a_budget_of_media_and_are_full_of_one_or_the_other() -> None:
    random = np.random.default_rng(2)
    media = random.integers(0, 4, 2000) * random.integers(60, 71, 2000) * random.integers(0, 2, 2000)
    lengths = np.minimum(media + random.integers(5, 120, 2000), 512)
    free, tight = Whole(lengths, 512, 3), Whole(lengths, 512, 3, MediaBudget(media, 210))
    together: list[set[frozenset[int]]] = []
    for _ in range(2):
        pieces_of = tight.epoch(random.permutation(2000))
        rows = [[piece.document for piece in pieces_of(row)] for row in range(tight.sequences_per_epoch)]
        assert sorted(document for row in rows for document in row) == [*range(2000)], "each once an epoch"
        assert max(int(media[row].sum()) for row in rows) == 210
        assert max(int(lengths[row].sum()) for row in rows) <= 512
        together.append({*map(frozenset, rows)})
    assert len(together[0] & together[1]) < len(rows) / 3, "most share a row with others in the next epoch"
    assert media.sum() / (210 * len(rows)) > 0.9, "it is media that take the place"
    assert tight.padding == pytest.approx(1 - lengths.sum() / (512 * len(rows))) and tight.padding > free.padding + 0.1
    loose = Whole(lengths, 512, 3, MediaBudget(media, 511))
    assert loose.sequences_per_epoch == free.sequences_per_epoch, "more than rows have by themselves costs nothing"
    few = MediaBudget(np.array([3, 3, 3, 0]), 4)
    assert best_fit(np.array([5, 5, 2, 2]), 10, np.arange(4), few) == [[0], [1, 3], [2]]
    with pytest.raises(ShardError, match=r"with 210 soft tokens of media, more than data.max_media_tokens=200"):
        Whole(lengths, 512, 3, MediaBudget(media, 200))
