"""Many real ranks in one test: processes forked from this one, joined over gloo."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  imported here once, so that no forked rank has to
import torch
import torch._dynamo  # the same
import torch.distributed as dist
import torch.distributed.pipelining

from parallel.world import World


def run_ranks(world_size: int, function: Callable[[World], Any], timeout: float = 240.0) -> list[Any]:
    """What `function(world)` returned on each rank. A rank that raises fails the test with its traceback."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [_fork(rank, world_size, function, folder) for rank in range(world_size)]
        _wait(children, timeout)
        results = []
        for rank in range(world_size):
            path = folder / f"result_{rank}"
            if not path.exists():
                raise AssertionError(f"rank {rank} of {world_size} died without a result")
            ok, value = pickle.loads(path.read_bytes())
            if not ok:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
            results.append(value)
        return results


def all_ranks() -> dist.ProcessGroup:
    """The group of every rank that was started."""
    group = dist.group.WORLD
    assert group is not None
    return group


def _fork(rank: int, world_size: int, function: Callable[[World], Any], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status: tuple[bool, Any]
    try:
        torch.set_num_threads(int(os.environ.get("RANK_THREADS", "1")))
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        status = True, function(World(rank, world_size, rank, world_size))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        status = False, traceback.format_exc()
    aside = folder / f".result_{rank}"
    aside.write_bytes(pickle.dumps(status))
    aside.rename(folder / f"result_{rank}")
    os._exit(0)


def _wait(children: list[int], timeout: float) -> None:
    """Until all have ended; after a failure or the timeout, none goes on."""
    deadline = time.monotonic() + timeout
    left = set(children)
    while left and time.monotonic() < deadline:
        for child in list(left):
            if os.waitpid(child, os.WNOHANG)[0]:
                left.discard(child)
        time.sleep(0.01)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
