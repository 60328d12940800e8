"""Micro-batches of one data-parallel rank, in front of an index-addressed dataset.

The whole data state is one integer, the number of sequences seen: the next G make up the next
step, dealt to ranks and micro-batches by index, so any mesh may go on from any point.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from data.batch import Batch, Row, collate
from model import Gemma4Config, UserError


class StepSampler(Sampler[list[int]]):
    """Index lists of this rank's micro-batches for `steps` steps, from sequence `first_sequence` on."""

    def __init__(
        self,
        first_sequence: int,
        steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.first_sequence, self.steps = first_sequence, steps
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.num_ranks = rank, num_ranks

    @property
    def accumulation(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            for micro in range(self.accumulation):
                start = self.first_sequence + step * self.global_batch_size
                start += (micro * self.num_ranks + self.rank) * self.micro_batch_size
                yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        return self.steps * self.accumulation


def load_batches(dataset: Dataset[Row], sampler: StepSampler, workers: int, config: Gemma4Config) -> Iterator[Batch]:
    """Batches of a rank's micro-batches in order, made by `workers` processes (0: by this one).

    A mistake of the user's in a row (a media file that is gone) is raised here as it was there.
    """
    loader = StatefulDataLoader(
        _Batches(dataset, config),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_stop_signals,
        snapshot_every_n_steps=1 << 30,  # the state is the sequence number, which the trainer keeps
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Batches(Dataset[Batch]):
    """Whole batches by their row numbers; an error comes as a value, which a worker hands on without its traceback."""

    def __init__(self, dataset: Dataset[Row], config: Gemma4Config) -> None:
        self.dataset, self.config = dataset, config

    def __getitems__(self, indices: list[int]) -> Batch | UserError:
        try:
            return collate([self.dataset[index] for index in indices], self.config)
        except UserError as error:
            return UserError(str(error))


def _as_it_is(batch: Batch | UserError) -> Batch | UserError:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    """A launcher signals a whole process group; workers must live until the trainer has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
