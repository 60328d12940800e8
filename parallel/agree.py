"""What ranks tell each other outside the computation, over the CPU: small values, counts, and failures.

Every rank of the group must call these; without a process group they are those of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
Group = dist.ProcessGroup | None
_LONGEST = 300


class RankError(OSError):
    """What the first rank that failed said, raised on all: mostly of a file or a folder."""


def from_all(value: T, group: Group = None) -> list[T]:
    """Each rank's value, in order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def summed_counts(*counts: int) -> list[int]:
    """Each count, added up over all ranks without touching the GPU."""
    total = torch.tensor(counts, dtype=torch.int64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def together(step: Callable[[], T], group: Group = None) -> T:
    """The result of a step on this rank, once it is done on all. Raises `RankError` if it failed on any."""
    result, failure = _attempt(step)
    _raise_first(from_all(failure, group))
    return cast(T, result)


def on_rank_0(step: Callable[[], T], group: Group = None) -> T:
    """The result of a step that rank 0 alone runs, on every rank. Raises `RankError` if it failed."""
    first = not dist.is_initialized() or dist.get_rank(group) == 0
    box = [_attempt(step) if first else (None, None)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=group, group_src=0)
    result, failure = box[0]
    _raise_first([failure])
    return cast(T, result)


def _attempt(step: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return step(), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also torch's CheckpointException, for a rank that left would leave others waiting
        return None, " ".join(str(error).split())[:_LONGEST] or type(error).__name__


def _raise_first(failures: list[str | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise RankError(failure)
