"""Batches are dealt alike on every mesh."""

from __future__ import annotations

import pytest

from data.batch import Batch
from data.corpus.dataset import PackedDataset
from data.corpus.prepare import Corpus
from data.loader import StepSampler, load_batches
from model import Gemma4Config
from tests.data.corpus.files import texts

LENGTH = 48
TINY = Gemma4Config.from_name("gemma4_tiny_e4b")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return texts(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 8), (2, 2), (4, 2), (8, 1)])
def test_every_mesh_and_worker_count_deals_the_same_sequences(
    corpus: Corpus, num_ranks: int, micro: int, workers: int
) -> None:
    dataset = PackedDataset(corpus, LENGTH, 3, TINY)
    steps: list[list[Batch]] = [[], [], []]
    for rank in range(num_ranks):
        sampler = StepSampler(40, 3, 8, micro, rank, num_ranks)
        for i, batch in enumerate(load_batches(dataset, sampler, workers, TINY)):
            steps[i // sampler.accumulation].append(batch)
    for step, batches in enumerate(steps):
        found = {tuple(row) for batch in batches for row in batch.tokens_BS.tolist()}
        assert found == {tuple(dataset[40 + step * 8 + i].tokens_S.tolist()) for i in range(8)}
        assert sum(batch.tokens_BS.shape[0] for batch in batches) == 8
