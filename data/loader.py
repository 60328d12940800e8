"""Micro-batches of one data-parallel rank, in front of an index-addressed dataset.

The whole data state is one integer, the number of sequences seen: the next G make up the next step, dealt to ranks and
micro-batches by index, so any mesh may go on from any point. It is what the sampler adds to the loader's state; the
rest of that is about this rank and its workers.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import Stateful, StatefulDataLoader

from data.batch import Batch, Row, collate
from data.workers import begin_worker
from model import Gemma4Config, UserError


class StepSampler(Sampler[list[int]], Stateful):
    """Index lists of this rank's micro-batches for `steps` steps, from sequence `first_sequence` on.

    Its state is the number of sequences, over all ranks, of the steps whose micro-batches were all handed out.
    """

    def __init__(
        self, first_sequence: int, steps: int, global_batch_size: int, micro_batch_size: int, rank: int, num_ranks: int
    ) -> None:
        self.sequences_seen, self.end = first_sequence, first_sequence + steps * global_batch_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.num_ranks = rank, num_ranks

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank runs before an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        while (first := self.sequences_seen) < self.end:
            for micro in range(self.accumulation):
                start = first + (micro * self.num_ranks + self.rank) * self.micro_batch_size
                if micro == self.accumulation - 1:
                    self.sequences_seen = first + self.global_batch_size
                yield list(range(start, start + self.micro_batch_size))

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, for a checkpoint."""
        return {"sequences_seen": self.sequences_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the position that a checkpoint saved."""
        self.sequences_seen = state_dict["sequences_seen"]


class BatchLoader(Iterator[Batch]):
    """Batches of a rank's micro-batches in order, made by `workers` processes (0: by this one).

    A mistake of the user's in a row (a media file that is gone) is raised here as it was there.
    """

    def __init__(self, dataset: Dataset[Row], sampler: StepSampler, workers: int, config: Gemma4Config) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata calls what torch deprecates
            self._loader = StatefulDataLoader(
                _Batches(dataset, config, packed=workers > 0),
                batch_sampler=sampler,
                num_workers=workers,
                collate_fn=_as_it_is,
                prefetch_factor=4 if workers else None,
                worker_init_fn=_begin_worker,
            )
        self._batches = iter(self._loader)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if isinstance(batch, bytes):
            batch = pickle.loads(batch)
        if isinstance(batch, UserError):
            raise batch
        return batch

    @property
    def sequences_seen(self) -> int:
        """The number of sequences of the steps whose batches were all taken from here, not those fetched ahead."""
        return _find("sequences_seen", self._loader.state_dict())


def _find(key: str, state: Any) -> Any:
    """What the sampler says of itself in a loader's state, which has another form for each number of workers."""
    if not isinstance(state, dict):
        return None
    found = (_find(key, inner) for inner in state.values())
    return state[key] if key in state else next((value for value in found if value is not None), None)


class _Batches(Dataset[Batch]):
    """Whole batches by their row numbers; an error comes as a value, which a worker hands on without its traceback.

    packed: as bytes, which cross to the trainer through a pipe. Tensors would cross in shared memory, of which
    containers have 64 MB: a worker that finds it full is killed, and may hang.
    """

    def __init__(self, dataset: Dataset[Row], config: Gemma4Config, packed: bool) -> None:
        self.dataset, self.config, self.packed = dataset, config, packed

    def __getitems__(self, indices: list[int]) -> Batch | UserError | bytes:
        batch: Batch | UserError
        try:
            batch = collate([self.dataset[index] for index in indices], self.config)
        except UserError as error:
            batch = UserError(str(error))
        return _pack(batch) if self.packed else batch


class _Packer(pickle.Pickler):
    """Writes tensors as arrays, many times faster than torch's own form."""

    def reducer_override(self, value: Any) -> Any:
        """How to rebuild a tensor; anything else is left to pickle."""
        return (torch.from_numpy, (value.numpy(),)) if type(value) is torch.Tensor else NotImplemented


def _pack(batch: Batch | UserError) -> bytes:
    held = io.BytesIO()
    _Packer(held, protocol=5).dump(batch)
    return held.getvalue()


def _as_it_is(batch: Batch | UserError | bytes) -> Batch | UserError | bytes:
    return batch


def _begin_worker(worker: int) -> None:
    begin_worker(os.getppid())
