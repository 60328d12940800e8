"""Runs on several sources: what each gave, also after the mixture was changed, and where limits end a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model import ConfigError
from tests.harness.runs import make_corpus, overrides, records, train_on

LENGTH, BATCH = 48, 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_corpus(folder)
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    for name, part in (("a", lines[::3]), ("b", lines[1::3]), ("c", lines[2::3])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    return folder


def mixed(sources: Path, tmp_path: Path, steps: int, given: str, *more: str) -> list[str]:
    for name in "abc":
        given = given.replace(f"path: {name}", f"path: {sources / name}.jsonl")
    cache = f"data.cache={sources / 'cache'}"
    arguments = [argument for argument in overrides(tmp_path, *more) if not argument.startswith("data.source=")]
    return [*arguments, cache, f"data.sources=[{given}]", f"train.steps={steps}", "schedule.name=constant"]


def used(tmp_path: Path, step: int) -> list[int]:
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    return [*state["used"].values()]


def test_a_run_that_is_mixed_anew_goes_on_in_each_source(sources: Path, tmp_path: Path, caplog: Any) -> None:
    train_on(1, mixed(sources, tmp_path, 2, "{path: a, weight: 1}, {path: b, weight: 1}"))
    assert used(tmp_path, 2) == [8, 8]
    train_on(2, mixed(sources, tmp_path, 4, "{path: a, weight: 3}, {path: c, weight: 1}"))
    assert used(tmp_path, 4) == [8 + 12, 4], "a goes on, b is gone, c begins"
    train_on(1, mixed(sources, tmp_path, 5, "{path: a, weight: 3}, {path: c, weight: 1}"))
    assert used(tmp_path, 5) == [8 + 18, 6], "the same mixture goes on from where it was changed"
    rows = records(tmp_path / "run")
    assert [row["source_tokens/a.jsonl"] // LENGTH for row in rows] == [4, 8, 14, 20, 26]
    assert [row.get("source_tokens/b.jsonl", 0) // LENGTH for row in rows] == [4, 8, 0, 0, 0]
    assert rows[4]["source_epochs/a.jsonl"] > rows[4]["source_epochs/c.jsonl"] > 0


def test_weights_change_at_a_step(sources: Path, tmp_path: Path) -> None:
    schedule = "data.weight_schedule=[{step: 2, weights: [0, 1]}]"
    train_on(1, mixed(sources, tmp_path, 3, "{path: a, weight: 3}, {path: b, weight: 1}", schedule))
    assert used(tmp_path, 3) == [12, 4 + 8]


def test_limits_end_a_run_and_too_many_steps_are_refused_with_the_most(sources: Path, tmp_path: Path) -> None:
    limited = "{path: a, epochs: 0.5}, {path: b, max_tokens: 500}"
    with pytest.raises(AssertionError, match=r"leave (\d+) sequences, enough for (\d+) steps and not for 90") as caught:
        train_on(1, mixed(sources, tmp_path, 90, limited))
    assert ConfigError.__name__ in str(caught.value)
    most = int(str(caught.value).split("enough for ")[1].split()[0])
    assert 1 < most < 20 and f"set train.steps={most}." in str(caught.value)
    train_on(1, [*mixed(sources, tmp_path, 1, limited), "train.steps=null"])
    counts = used(tmp_path, most)
    assert sum(counts) == most * BATCH and counts[1] == 500 // LENGTH
