"""What ranks tell each other outside the computation, over the CPU: small values, counts, and failures.

Every rank of the group must call these; without a process group they are those of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Group = dist.ProcessGroup | None


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
    for said in from_all(failure, group):
        if said is not None:
            raise RankError(said)
    return result


def on_rank_0(step: Callable[[], T], group: Group = None) -> T:
    """The result of a step that rank 0 alone runs, on every rank. Raises `RankError` if it failed."""
    alone = not dist.is_initialized() or dist.get_rank(group) == 0
    outcome: Any = _attempt(step) if alone else None
    result, failure = from_all(outcome, group)[0]
    if failure is not None:
        raise RankError(failure)
    return result


def _attempt(step: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return step(), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also torch's CheckpointException, for a rank that left would leave others waiting
        return None, " ".join(str(error).split())[:300] or type(error).__name__
