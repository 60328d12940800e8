"""Records that a kill, a full disk or an editor left in any state are read, cut and appended to."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fuzz import VALUES
from train.plots import write_loss_curve
from train.records import append, cut, read
from train.trackers import JsonlTracker


def test_records_past_the_resumed_step_and_half_lines_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": step * 1.0}) + "\n" for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 6, "lo')
    tracker = JsonlTracker(tmp_path, first_step=3)
    tracker.log({"step": 4, "loss": 9.0})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in found] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 9.0)]


def test_lines_of_others_stay_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('# mine\n{"step": 1}\n[1]\n{"step": 2}\n{"step": "3"}\n{"step": 4}\n')
    cut(path, 2)
    assert path.read_text() == '# mine\n{"step": 1}\n[1]\n{"step": 2}\n'
    append(path, {"step": 3})
    assert [record["step"] for record in read(path)] == [1, 2, 3]
    assert caplog.messages == [f"{path}: 2 lines are no records, the first is line 1; they are passed over"]


def test_a_file_that_is_missing_has_no_records(tmp_path: Path) -> None:
    cut(tmp_path / "metrics.jsonl", 3)
    assert read(tmp_path / "metrics.jsonl") == [] and list(tmp_path.iterdir()) == []


def test_any_line_is_a_record_or_passed_over(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "metrics.jsonl"
    good: list[Any] = [{"step": step, "loss": 2.0} for step in (1, 2)]
    lines = [json.dumps(record) for record in good]
    for _ in range(300):
        record = {key: draw.choice(VALUES) for key in draw.sample(["step", "loss", "text", "prompt"], 2)}
        line = json.dumps(draw.choice((record, record, draw.choice(VALUES))))
        lines.insert(draw.randrange(len(lines)), line[: draw.choice((len(line), draw.randrange(len(line) + 1)))])
    path.write_text("\n".join(lines) + "\n")
    found = read(path, ("step", "loss"))
    assert [record for record in found if record in good] == good
    assert all(float(record["step"]) == record["step"] for record in found)
    cut(path, 1)
    assert all(record["step"] <= 1 for record in read(path)) and good[0] in read(path)
    assert write_loss_curve(tmp_path) == tmp_path / "loss.png"
