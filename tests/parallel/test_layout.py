"""What is refused before any group is made, in which words, and that the layout named instead is legal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from model import ConfigError, Gemma4Config
from parallel.layout import Layout, problem, resolve_layout
from tests.harness.report import report

# (ranks, variant, sequence length, what is asked for, cause, advice)
ILLEGAL: list[tuple[int, str, int, dict[str, Any], str, str]] = [
    (8, "31b", 4096, {"tp": 3}, "parallel.tp=3 does not divide the 8 ranks", "tp=4"),
    (6, "31b", 4096, {"tp": 3}, "parallel.tp=3 does not divide num_attention_heads=32", "tp=2"),
    (6, "e2b", 4096, {"tp": 6}, "parallel.tp=6 does not divide num_attention_heads=8", "tp=2"),
    (16, "e4b", 4096, {"tp": 16}, "parallel.tp=16 does not divide num_attention_heads=8", "tp=8"),
    (64, "31b", 4096, {"tp": 64}, "parallel.tp=64 does not divide num_attention_heads=32", "tp=32"),
    (4, "31b", 4096, {"dp_shard": 8}, "parallel.dp_shard=8 is not the 4 ranks", "dp_shard=4"),
    (8, "31b", 4096, {"dp_replicate": 2, "dp_shard": 8}, "is not the 8 ranks", "dp_replicate=1 parallel.dp_shard=8"),
    (6, "31b", 4096, {"dp_replicate": 4}, "parallel.dp_replicate=4 does not divide the 6 ranks", "dp_replicate=3"),
    (4, "31b", 4096, {"dp_shard": 0}, "parallel.dp_shard=0 is no size", "-1 (all ranks that are left)"),
    (4, "31b", 4096, {"tp": 0}, "parallel.tp=0 is no size", "1"),
    (4, "31b", 4096, {"cp": -2}, "parallel.cp=-2 is no size", "1"),
    (4, "31b", 4090, {"cp": 4}, "parallel.cp=4 cuts a sequence into 8 pieces", "cp=1"),
    (
        8,
        "12b",
        4100,
        {"cp": 8},
        "cuts a sequence into 16 pieces, which do not divide data.sequence_length=4100",
        "cp=2",
    ),
    (8, "31b", 4090, {"tp": 8}, "parallel.sequence_parallel with tp=8", "sequence_parallel=false"),
    (8, "31b", 4100, {"tp": 4, "cp": 2}, "does not divide the 2050 positions", "sequence_parallel=false"),
    (64, "12b", 4096, {"pp": 64}, "parallel.pp=64 exceeds num_hidden_layers=48", "pp=32"),
    (4, "31b", 4096, {"ep": 4}, "parallel.ep=4, but this model has no experts", "ep=1"),
    (6, "26b_a4b", 4096, {"ep": 3}, "parallel.ep=3 does not divide num_experts=128", "ep=1"),
    (4, "26b_a4b", 4096, {"ep": 8}, "parallel.ep=8 does not divide dp_shard x cp x tp=4", "ep=4"),
    (8, "26b_a4b", 4096, {"ep": 8, "dp_replicate": 2}, "does not divide dp_shard x cp x tp=4", "dp_replicate=1"),
    (256, "26b_a4b", 4096, {"ep": 256}, "parallel.ep=256 does not divide num_experts=128", "ep=128"),
    (10, "31b", 4100, {"tp": 2, "dp_shard": 5}, "does not divide further among dp_shard x cp=5", "dp_"),
    (20, "26b_a4b", 4096, {"ep": 4}, "do not divide further among 5 ranks", "ep="),
    (12, "26b_a4b", 4096, {"tp": 4, "cp": 2}, "does not divide the 12 ranks", "tp=4"),
]


@pytest.mark.parametrize(("ranks", "variant", "length", "asked", "cause", "advice"), ILLEGAL, ids=str)
def test_an_illegal_layout_is_refused_with_the_nearest_legal_one(
    ranks: int, variant: str, length: int, asked: dict[str, Any], cause: str, advice: str
) -> None:
    config = Gemma4Config.from_name(variant)
    wanted = Layout(**({"dp_shard": -1} | asked))
    with pytest.raises(ConfigError) as caught:
        resolve_layout(ranks, wanted, config, length)
    message = str(caught.value)
    report(
        "Illegal layouts", {"ranks": ranks, "variant": variant, "length": length, "asked": asked, "message": message}
    )
    assert cause in message and advice in message and "\n" not in message
    if "nearest legal" in message:
        sizes = {key: int(value) for key, value in re.findall(r"parallel\.(\w+)=(-?\d+)", message.split("nearest")[1])}
        flat = "sequence_parallel=false" in message.split("nearest")[1]
        near = Layout(**({"dp_shard": -1, "sequence_parallel": not flat} | sizes))
        found = resolve_layout(ranks, near, config, length)
        assert problem(found, config, length) is None and found.world_size == ranks


def test_legal_layouts_fill_in_what_is_left() -> None:
    config = Gemma4Config.from_name("26b_a4b")
    found = resolve_layout(64, Layout(dp_shard=-1, tp=4, cp=2, ep=32, pp=2), config, 8192)
    assert found.dp_shard == 4 and found.sharding == 32
    assert str(found) == "pp 2 x dp_shard 4 x cp 2 x tp 4 x ep 32, sequence parallel"
    assert [found.data_rank(rank) for rank in (0, 7, 8, 63)] == [0, 0, 1, 3]
    assert found.coordinate(63) == {"pp": 1, "dp_replicate": 0, "dp_shard": 3, "cp": 1, "tp": 3}
    assert str(resolve_layout(1, Layout(dp_shard=-1), config, 8192)) == "one rank"
