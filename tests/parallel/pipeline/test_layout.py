"""Where pipelines are cut, against every other way to cut them, and what their schedules refuse."""

from __future__ import annotations

from itertools import combinations

import pytest

from model import ConfigError, Gemma4Config
from parallel.pipeline.layout import check_pipeline, cut_layers, token_costs


@pytest.mark.parametrize("name", ["tiny_e2b", "tiny_26b_a4b", "e4b"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_dearest_stage_is_as_cheap_as_can_be(name: str, stages: int) -> None:
    config = Gemma4Config.from_name(name)
    costs = token_costs(config, 4096)
    costs[-1] += config.hidden_size * config.vocab_size
    spans = cut_layers(config, 4096, stages)
    assert [i for span in spans for i in span] == list(range(config.num_hidden_layers))
    best = min(
        max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), stages - 1)
    )
    assert max(sum(costs[i] for i in span) for span in spans) == best


@pytest.mark.parametrize(
    ("schedule", "virtual", "pp", "layers", "micro_batches", "message"),
    [
        ("1f1b", 2, 4, 3, 8, "makes 4 stages of 3 layers"),
        ("interleaved", 4, 2, 6, 8, r"nearest legal: parallel\.pp_virtual=3"),
        ("1f1b", 2, 4, 12, 2, "needs at least 4 micro-batches"),
        ("interleaved", 2, 2, 12, 5, "nearest legal: 4"),
        ("zero_bubble", 2, 4, 12, 6, "nearest legal: 4"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(
    schedule: str, virtual: int, pp: int, layers: int, micro_batches: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_pipeline(schedule, virtual, pp, layers, micro_batches)


def test_zero_bubble_in_float8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nearest legal: parallel\.pp_schedule=interleaved, or float8\.recipe=none"):
        check_pipeline("zero_bubble", 2, 2, 12, 8, "rowwise")
    check_pipeline("interleaved", 2, 2, 12, 8, "rowwise")
