"""Many real ranks in one test: processes forked from this one, joined over gloo."""

from __future__ import annotations

import faulthandler
import gc
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
        children = [_fork(rank, world_size, function, folder, timeout) for rank in range(world_size)]
        ends = _wait(children, timeout)
        results = []
        for rank, child in enumerate(children):
            path = folder / f"result_{rank}"
            if not path.exists():
                stack = folder / f"stack_{rank}"
                where = stack.read_text() if stack.exists() else ""
                raise AssertionError(f"rank {rank} of {world_size} {ends[child]} without a result\n{where}")
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


def _fork(rank: int, world_size: int, function: Callable[[World], Any], folder: Path, timeout: float) -> int:
    gc.disable()  # garbage of the tests before may hold threads, for which its end would wait in the child in vain
    child = os.fork()
    if child:
        gc.enable()
        return child
    gc.freeze()
    gc.enable()
    status: tuple[bool, Any]
    try:
        stack = (folder / f"stack_{rank}").open("w")  # where it was when it crashed, or when its time was nearly over
        faulthandler.enable(stack)
        faulthandler.dump_traceback_later(max(timeout - 2, 1), file=stack)
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


def _wait(children: list[int], timeout: float) -> dict[int, str]:
    """How each has ended; after the timeout, none goes on."""
    deadline = time.monotonic() + timeout
    left, ends = set(children), dict[int, str]()
    while left and time.monotonic() < deadline:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                left.discard(child)
                code = os.waitstatus_to_exitcode(status)
                ends[child] = f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
        time.sleep(0.01)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ends[child] = f"was stopped after {timeout:.0f} s"
    return ends
