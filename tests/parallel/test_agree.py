"""What ranks tell each other outside the computation: each exchange in one start of two and of three ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parallel.agree import RankError, from_all, on_rank_0, summed_counts, together
from parallel.world import World
from tests.harness.distributed import run_ranks


def fails(message: str) -> Any:
    raise OSError(message)


def said(call: Callable[[], object]) -> str:
    with pytest.raises(RankError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_same_answer_or_the_same_failure(size: int) -> None:
    def on_rank(world: World) -> dict[str, Any]:
        rank, ran = world.rank, list[int]()

        def first() -> str:
            ran.append(rank)
            return f"rank {rank}"

        return {
            "values": from_all({"rank": rank}),
            "sums": summed_counts(rank, 1, 2**40),
            "own": together(lambda: rank * 10),
            "of rank 0": on_rank_0(first),
            "ran": ran,
            "the last fails": said(lambda: together(lambda: fails("no\n  room") if rank == world.size - 1 else None)),
            "all fail": said(lambda: together(lambda: fails(f"rank {rank}"))),
            "rank 0 fails": said(lambda: on_rank_0(lambda: fails("") if rank == 0 else None)),
            "a long one": len(said(lambda: together(lambda: fails("x" * 9999)))),
            "afterwards": from_all(rank),
        }

    for rank, found in enumerate(run_ranks(size, on_rank)):
        assert found == {
            "values": [{"rank": r} for r in range(size)],
            "sums": [sum(range(size)), size, size * 2**40],
            "own": rank * 10,
            "of rank 0": "rank 0",
            "ran": [0] if rank == 0 else [],
            "the last fails": "no room",
            "all fail": "rank 0",
            "rank 0 fails": "OSError",
            "a long one": 300,
            "afterwards": list(range(size)),
        }


def test_one_process_without_a_group_agrees_with_itself() -> None:
    assert (from_all(3), summed_counts(1, 2), together(lambda: 4), on_rank_0(lambda: 5)) == ([3], [1, 2], 4, 5)
    assert said(lambda: together(lambda: fails("alone"))) == said(lambda: on_rank_0(lambda: fails("alone"))) == "alone"
