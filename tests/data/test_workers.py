"""Work by several processes: in order, stopped and ended in time, and the same tokens as by one."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import data.workers
from data.workers import in_order
from model.errors import UserError
from tests.harness.chat_files import E4B, chat, make, model, user, write_media
from tests.harness.processes import alive, wait_until

PROCESSORS = 3


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.workers, "processors", lambda: PROCESSORS)


def nothing() -> None:
    pass


def square(number: int) -> tuple[int, int]:
    if number == 13:
        raise UserError("thirteen is bad luck.")
    if number == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.002 * (number % 3))
    return number * number, os.getpid()


def test_results_come_in_the_order_of_the_items_and_few_are_held() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100, 300):
            taken += 1
            yield number

    workers, ahead = set[int](), list[int]()
    for index, (result, worker) in enumerate(in_order(square, items(), nothing)):
        assert result == (100 + index) ** 2
        workers.add(worker)
        ahead.append(taken - index)
    assert os.getpid() not in workers and len(workers) == PROCESSORS
    assert max(ahead) <= 2 * PROCESSORS + 1


def test_one_item_is_worked_on_here() -> None:
    assert list(in_order(square, [5], nothing)) == [(25, os.getpid())]


@pytest.mark.parametrize(("bad", "message"), [(13, "thirteen is bad luck"), (17, "was killed, often for want of mem")])
def test_what_ends_the_work_is_one_error(bad: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(in_order(square, [0, 1, 2, bad, 3, 4], nothing))


def test_a_stop_ends_the_work() -> None:
    started = time.monotonic()

    def stop() -> None:
        if time.monotonic() - started > 0.2:
            raise UserError("told to stop.")

    with pytest.raises(UserError, match="told to stop"):
        list(in_order(time.sleep, [0.1] * 1000, stop))
    assert time.monotonic() - started < 20


def say(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(0.01)


def test_processes_end_with_the_one_they_work_for(tmp_path: Path) -> None:
    owner = os.fork()
    if owner == 0:
        list(in_order(say, [tmp_path] * 10_000, nothing))
        os._exit(0)
    assert wait_until(lambda: len([*tmp_path.iterdir()]) == PROCESSORS, 20)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert wait_until(lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()), 20)


class Garbage:
    """It is collected once the collector runs, not before, and says where."""

    def __init__(self, folder: Path) -> None:
        self.itself, self.folder = self, folder

    def __del__(self) -> None:
        (self.folder / str(os.getpid())).touch()


def collect(_: int) -> int:
    gc.collect()
    return os.getpid()


def test_garbage_of_the_owner_is_not_collected_by_what_was_forked(tmp_path: Path) -> None:
    """A decoder in it would wait for its threads, which are missing there."""
    gc.collect()
    Garbage(tmp_path)
    workers = set(in_order(collect, range(8), nothing))
    assert workers and os.getpid() not in workers
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_conversations_of_many_processes_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = user({"type": "image", "path": "cat.png"})
    lines = [chat(user(), model(f"It is {number}."), id=number) for number in range(700)]
    lines[300], lines[400] = {"messages": "none"}, chat(picture, model())
    shards = []
    for count in (PROCESSORS, 1):
        monkeypatch.setattr(data.workers, "processors", lambda count=count: count)
        folder = tmp_path / str(count)
        folder.mkdir()
        write_media(folder)
        with pytest.raises(UserError, match=r"chats\.jsonl:301 has neither"):
            make(folder, lines, E4B)
        shards.append(make(folder, lines[:300] + lines[301:], E4B).shard)
    assert shards[0].digest == shards[1].digest and shards[0].counts == shards[1].counts
    assert shards[0].counts.kept == 699 and shards[0].counts.keys == {"id": 698}
