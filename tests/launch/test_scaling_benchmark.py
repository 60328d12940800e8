"""What `launch.benchmarks.scaling` counts and measures."""

from __future__ import annotations

import sys

import pytest

from launch.arguments import run
from launch.benchmarks.scaling import Arguments, decoder, measure, measured
from parallel.world import World
from tests.harness.compare import hold
from tests.harness.distributed import run_ranks


def test_what_grows_is_counted_as_it_is_measured() -> None:
    def on_rank(world: World) -> list[dict[str, float]]:
        return [measured(decoder(), positions) for positions in (256, 1024)]

    ((short, long),) = run_ranks(1, on_rank)
    more = {name: long[name] - short[name] for name in long}
    hold(
        "bytes of 768 more positions, counted beside measured", abs(more["MB counted"] / more["MB measured"] - 1), 0.05
    )
    assert long["Gflop"] > 4 * short["Gflop"], "attention grows faster than the length"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["lenght"], "parts=lenght does not exist; nearest: length"), (["rank", "length"], "rank is what a process of")],
)
def test_a_part_that_is_none_is_refused(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling", *words])
    with pytest.raises(SystemExit, match=message):
        run(Arguments, measure, "", words="parts")
