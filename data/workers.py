"""Processes that make data for another one, and end with it."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from model.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]
"""What a process of `in_order` does with each item."""


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_worker() -> bool:
    """Whether this process works for another one, beside others that keep the other processors busy."""
    return multiprocessing.parent_process() is not None


def begin_worker(owner: int) -> None:
    """Live on when a launcher signals the whole process group, until the owner, a process number, has ended."""
    gc.freeze()  # the owner's garbage may hold threads, for which its end would wait here in vain
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    check_stop: Callable[[], None],
    workers: int = 0,
    abandon: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """`work` of each item, in the order of the items, by `workers` processes, or as many as there are processors.

    Few items are held at once, and one alone is worked on here. `check_stop` is called while results are awaited, and
    `abandon` where they are wanted no more, to end work that goes on.
    Raises `UserError` if a process is killed, and whatever `work` raises.
    """
    items, workers = iter(items), workers or processors()
    first = list(itertools.islice(items, 2))
    if len(first) < 2 or workers < 2:
        yield from map(work, itertools.chain(first, items))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(), _begin, (work, os.getpid()))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in itertools.chain(first, items):
            waiting.append(pool.submit(_run, item))
            if len(waiting) > 2 * workers:
                yield _result(waiting.popleft(), check_stop)
        while waiting:
            yield _result(waiting.popleft(), check_stop)
    except BrokenProcessPool:
        abandon()
        raise UserError(
            "a process that prepares data was killed, often for want of memory; give the job more, or fewer processors."
        ) from None
    except BaseException:
        abandon()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Result], check_stop: Callable[[], None]) -> Result:
    check_stop()
    while not wait([future], timeout=1).done:
        check_stop()
    return future.result()


def _begin(work: Callable[[Any], Any], owner: int) -> None:
    global _work
    _work = work
    torch.set_num_threads(1)
    begin_worker(owner)


def _run(item: Any) -> Any:
    return _work(item)


def _end_with(owner: int) -> None:
    """End this process once its owner is gone, also where it waits for a full pipe to be read."""
    while os.getppid() == owner:
        time.sleep(1)
    os._exit(1)
