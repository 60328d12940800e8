"""Batches are dealt alike on every mesh, and a loader knows how far it is."""

from __future__ import annotations

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from data.batch import Batch
from data.corpus.dataset import PackedDataset
from data.corpus.prepare import Corpus
from data.loader import BatchLoader, StepSampler
from model import Gemma4Config
from tests.harness.corpus_files import texts

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
        for i, batch in enumerate(BatchLoader(dataset, sampler, workers, TINY)):
            steps[i // sampler.accumulation].append(batch)
    for step, batches in enumerate(steps):
        found = {tuple(row) for batch in batches for row in batch.inputs.tokens_T.view(batch.labels_BS.shape).tolist()}
        assert found == {tuple(dataset[40 + step * 8 + i].tokens_S.tolist()) for i in range(8)}
        assert sum(batch.inputs.batch_size for batch in batches) == 8


def test_a_loader_s_state_counts_whole_steps_and_not_what_was_fetched_ahead(corpus: Corpus) -> None:
    dataset = PackedDataset(corpus, LENGTH, 3, TINY)
    for workers in (0, 2):
        batches = BatchLoader(dataset, StepSampler(40, 5, 8, 2, 1, 2), workers, TINY)
        seen = [batches.sequences_seen]
        for _ in range(5):
            next(batches)
            seen.append(batches.sequences_seen)
        assert seen == [40, 40, 48, 48, 56, 56], "two micro-batches make a step"
        for others in (0, 1):  # goes on with another number of workers, on another number of ranks
            rest = BatchLoader(dataset, StepSampler(seen[-1], 3, 8, 4, 0, 1), others, TINY)
            rows = [row for batch in rest for row in batch.inputs.tokens_T.view(batch.labels_BS.shape).tolist()]
            assert rows == [dataset[i].tokens_S.tolist() for i in range(56, 80)] and rest.sequences_seen == 80


def test_torchdata_restores_the_sampler(corpus: Corpus) -> None:
    dataset = PackedDataset(corpus, LENGTH, 3, TINY)
    loaders = [StatefulDataLoader(dataset, batch_sampler=StepSampler(0, 4, 8, 4, 0, 1), collate_fn=list) for _ in "ab"]
    first, wanted = iter(loaders[0]), [dataset[i].tokens_S.tolist() for i in range(8, 32)]
    for _ in range(3):  # a step and a half
        next(first)
    loaders[1].load_state_dict(loaders[0].state_dict())
    assert [row.tokens_S.tolist() for batch in loaders[1] for row in batch] == wanted
