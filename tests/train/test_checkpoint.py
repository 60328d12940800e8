"""Checkpoints: whole or not there, verified, pruned, written in the background or not."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import train.checkpoint
from model import UserError
from parallel.world import World, is_lost_rank
from tests.harness.distributed import run_ranks
from tests.harness.runs import losses, overrides, records, train_on, train_once
from train.load_config import load_config
from train.resolve import resolve
from train.trainer import Trainer

STEPS = ["train.steps=6", "schedule.name=constant", "schedule.warmup_steps=0"]


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_run_keeps_the_last_k_whole_checkpoints_and_latest(tmp_path: Path, asynchronous: str) -> None:
    more = ["checkpoint.every=2", "checkpoint.keep=2", f"checkpoint.asynchronous={asynchronous}"]
    train_on(2, overrides(tmp_path, *STEPS, *more))
    run = tmp_path / "run"
    assert names(run) == ["LATEST", "step_00000004", "step_00000006"]
    assert (run / "checkpoints" / "LATEST").read_text() == "step_00000006"
    for step in (4, 6):
        folder = run / "checkpoints" / f"step_{step:08d}"
        manifest = json.loads((folder / "manifest.json").read_text())["files"]
        assert set(manifest) | {"manifest.json"} == {p.name for p in folder.iterdir()}
        assert any(name.startswith("__0_") for name in manifest) and any(name.startswith("__1_") for name in manifest)
        assert json.loads((folder / "state.json").read_text())["step"] == step


def test_asynchronous_checkpoints_hold_the_step_they_name(tmp_path: Path) -> None:
    for run, asynchronous in (("now", "false"), ("later", "true")):
        more = ["checkpoint.every=2", "checkpoint.keep=9", f"checkpoint.asynchronous={asynchronous}"]
        train_on(1, overrides(tmp_path, *STEPS, *more, run=run))
    for step in (2, 4, 6):
        resumed = {}
        for run in ("now", "later"):
            source = tmp_path / run / "checkpoints" / f"step_{step:08d}"
            arguments = overrides(tmp_path, *STEPS, f"run.resume={source}", "train.steps=7", run=f"{run}-{step}")
            resumed[run] = train_on(1, arguments)
        for name, tensor in resumed["now"].items():
            assert torch.equal(tensor, resumed["later"][name]), (step, name)


def corrupt(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    train_on(2, overrides(tmp_path, *STEPS, "checkpoint.every=2", "checkpoint.keep=3"))
    run = tmp_path / "run"
    expected = losses(run)
    corrupt(next((run / "checkpoints" / "step_00000006").glob("__1_*")))
    (run / "checkpoints" / ".step_00000008.partial").mkdir()

    def resume(world: World) -> dict[str, Any]:
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("gemwright").addHandler(handler)
        return train_once(overrides(tmp_path, *STEPS), world) | {"messages": messages}

    result = run_ranks(2, resume)[0]
    assert any("step_00000006 is damaged (__1_0.distcp has another checksum)" in m for m in result["messages"])
    assert result["step"] == 6 and losses(run) == expected
    assert names(run) == ["LATEST", "step_00000004", "step_00000006"]


@pytest.mark.parametrize("harm", ["truncate", "remove", "state"])
def test_other_damage_is_found_too(tmp_path: Path, harm: str) -> None:
    train_on(1, overrides(tmp_path, *STEPS))
    folder = tmp_path / "run" / "checkpoints" / "step_00000006"
    file = folder / ("state.json" if harm == "state" else "__0_0.distcp")
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif harm == "remove":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"step": 6', '"step": 5'))

    def resume(world: World) -> str:
        with pytest.raises(UserError) as caught:
            Trainer(resolve(load_config(overrides(tmp_path, *STEPS)), world.size), world, torch.device("cpu"))
        return str(caught.value)

    assert "every checkpoint" in run_ranks(1, resume)[0]


def test_a_checkpoint_is_saved_when_its_time_has_come(tmp_path: Path) -> None:
    """No step is as long as the first limit, every one is longer than the second; all ranks go by rank 0's clock."""
    for minutes, saved in (("60", ["step_00000003"]), ("1e-9", ["step_00000001", "step_00000002", "step_00000003"])):
        folder = tmp_path / minutes
        folder.mkdir()
        options = ["train.steps=3", "checkpoint.every=0", "checkpoint.keep=9", f"checkpoint.every_minutes={minutes}"]
        train_on(2, overrides(folder, *options))
        assert sorted(path.name for path in (folder / "run" / "checkpoints").glob("step_*")) == saved


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(tmp_path: Path, asynchronous: str) -> None:
    train_on(2, overrides(tmp_path, *STEPS, "checkpoint.every=2"))
    run = tmp_path / "run"
    before = names(run)

    def no_room(world: World) -> str:
        more = ["train.steps=9", f"checkpoint.asynchronous={asynchronous}"]
        run = resolve(load_config(overrides(tmp_path, *STEPS, *more)), world.size)
        trainer = Trainer(run, world, torch.device("cpu"))
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writes fail as on a full disk
        with pytest.raises(UserError) as caught:
            trainer.train()
        return str(caught.value)

    messages = run_ranks(2, no_room)
    assert "step_00000009 could not be written" in messages[0]
    assert "File too large" in messages[0] or "as on a full disk" in messages[0]
    assert "make room" in messages[1] and "\n" not in messages[0]
    assert names(run) == before
    train_on(2, overrides(tmp_path, *STEPS, "train.steps=9"))
    assert (run / "checkpoints" / "LATEST").read_text() == "step_00000009"


def refused(arguments: list[str], ranks: int = 1) -> str:
    """The one line with which a run is refused before its first step."""

    def start(world: World) -> str:
        with pytest.raises(UserError) as caught:
            Trainer(resolve(load_config(arguments), world.size), world, torch.device("cpu"))
        return str(caught.value)

    return run_ranks(ranks, start)[0]


def test_a_rank_lost_during_a_save_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a rank that is gone leaves the save as it is, and `train.main` says it in its own words."""
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    def save(*args: Any, **options: Any) -> None:
        raise train.checkpoint.dcp.api.CheckpointException("write", {1: (gone, traceback.StackSummary())})

    monkeypatch.setattr(train.checkpoint.dcp, "save", save)

    def on_rank(world: World) -> bool:
        with pytest.raises(RuntimeError) as caught:
            train_once(overrides(tmp_path, *STEPS, "train.steps=1"), world)
        return caught.value is gone and is_lost_rank(caught.value)

    assert run_ranks(1, on_rank) == [True]


def test_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    train_on(1, overrides(tmp_path, *STEPS))
    assert "model.hidden_size=64, this run 32" in refused(overrides(tmp_path, *STEPS, "model.hidden_size=32"))
    message = refused(overrides(tmp_path, *STEPS, "data.tokenizer_vocab_size=410"))
    assert "another tokenizer" in message and "tokenizer.json" in message
    tokenizer = f"data.tokenizer={tmp_path / 'run' / 'tokenizer.json'}"
    assert train_on(1, overrides(tmp_path, *STEPS, tokenizer, "train.steps=7"))


def test_other_data_starts_its_own_index(tmp_path: Path) -> None:
    train_on(1, overrides(tmp_path, *STEPS))

    def resume(world: World) -> int:
        arguments = overrides(tmp_path, *STEPS, "train.steps=8", "data.sequence_length=24")
        trainer = Trainer(resolve(load_config(arguments), world.size), world, torch.device("cpu"))
        assert trainer.progress.step == 6
        return trainer.progress.sequences_seen

    assert run_ranks(1, resume) == [0]


def test_never_resuming_does_not_bury_another_run(tmp_path: Path) -> None:
    train_on(1, overrides(tmp_path, *STEPS))
    assert "holds checkpoints of another run" in refused(overrides(tmp_path, *STEPS, "run.resume=never"))
    shutil.rmtree(tmp_path / "run")
    assert train_on(1, overrides(tmp_path, *STEPS, "run.resume=never"))


def test_a_folder_to_resume_from_is_where_a_run_starts_and_nothing_is_buried(tmp_path: Path) -> None:
    train_on(1, overrides(tmp_path, *STEPS, "checkpoint.every=2", "checkpoint.keep=9"))
    earlier = tmp_path / "run" / "checkpoints" / "step_00000002"
    resume = f"run.resume={earlier}"
    assert "would bury the later step_00000006" in refused(overrides(tmp_path, *STEPS, resume))
    branch = overrides(tmp_path, *STEPS, resume, "train.steps=4", run="branch")
    train_on(1, branch)
    assert [r["step"] for r in records(tmp_path / "branch")] == [3, 4]
    train_on(1, [*branch, "train.steps=5"])  # the same command again goes on from the branch
    assert [r["step"] for r in records(tmp_path / "branch")] == [3, 4, 5]
    assert names(tmp_path / "run") == ["LATEST", "step_00000002", "step_00000004", "step_00000006"]


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.checkpoint._VISIBLE_SECONDS", 0.3)

    def start(world: World) -> str:
        arguments = overrides(tmp_path, *STEPS, run=f"run-{world.rank}")
        with pytest.raises(UserError) as caught:
            Trainer(resolve(load_config(arguments), world.size), world, torch.device("cpu"))
        return str(caught.value)

    overrides(tmp_path)
    assert all("put run.dir on a file system that all nodes share" in message for message in run_ranks(2, start))


# Every call that changes the checkpoint folder while a checkpoint is published.
CRASHES = [
    ("replace_file", 1),
    ("replace_file", 2),
    ("replace_file", 3),
    ("Path.rename", 1),
    ("Path.rename", 2),
    ("Path.rename", 3),
    ("os.replace", 3),
    ("rmtree", 1),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("call", "number"), CRASHES, ids=[f"{call}-{number}" for call, number in CRASHES])
def test_a_kill_at_any_point_of_a_save_loses_nothing(tmp_path: Path, call: str, number: int, after: bool) -> None:
    steps = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep=1"]
    expected = train_on(1, overrides(tmp_path, *steps, run="whole"))

    def die(world: World) -> None:
        trainer = Trainer(resolve(load_config(overrides(tmp_path, *steps)), world.size), world, torch.device("cpu"))
        save = trainer.checkpointer.save

        def deadly_save(step: int, *rest: Any) -> None:
            if step == 4:
                owner, name = {
                    "replace_file": (train.checkpoint, "replace_file"),
                    "Path.rename": (Path, "rename"),
                    "os.replace": (os, "replace"),
                    "rmtree": (shutil, "rmtree"),
                }[call]
                original, calls = getattr(owner, name), []

                def deadly(*args: Any, **kwargs: Any) -> Any:
                    calls.append(1)
                    if len(calls) == number and not after:
                        os._exit(9)
                    result = original(*args, **kwargs)
                    if len(calls) == number:
                        os._exit(9)
                    return result

                setattr(owner, name, deadly)
            save(step, *rest)

        trainer.checkpointer.save = deadly_save  # type: ignore[assignment, method-assign]
        trainer.train()

    with pytest.raises(AssertionError, match="ended with status 9 without a result"):
        run_ranks(1, die)
    found = train_on(1, overrides(tmp_path, *steps))
    assert set(names(tmp_path / "run")) - {"step_00000002"} == {"LATEST", "step_00000004"}
    assert (tmp_path / "run" / "checkpoints" / "LATEST").read_text() == "step_00000004"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
