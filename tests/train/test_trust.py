"""Checkpoints and exports of strangers, of vandals and of bad luck: nothing is run, nothing of others is deleted."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoTokenizer

from model import UserError
from parallel.world import World
from tests.harness.distributed import run_ranks
from tests.harness.exports import export_of
from tests.harness.fuzz import VALUES
from tests.harness.runs import losses, overrides, train_on
from train.checkpoint import Checkpointer
from train.checkpoint_reader import TensorReader
from train.manifest import checksum, damage

STEPS = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep=2"]
MARK = "ran-a-stranger-s-code"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps, and checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    train_on(1, overrides(folder, *STEPS))
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def newest(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step_00000004"


def resign(checkpoint: Path) -> None:
    """Make the manifest agree with the files, as who changed them on purpose would."""
    path = checkpoint / "manifest.json"
    files = json.loads(path.read_text())["files"]
    for name in files:
        data = (checkpoint / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps({"files": files}))


class Hostile:
    """Unpickled, it leaves a mark in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(MARK),))


class Evaluating:
    """The same by a function of Python's own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({MARK!r}, 'w')",))


def poison_metadata(checkpoint: Path, payload: object) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(payload))


def spoil_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"\x80\x04garbage")


def poison_entry(checkpoint: Path) -> None:
    """A tensor's name now stands for bytes, which torch would unpickle."""
    path = checkpoint / ".metadata"
    metadata = TensorReader(checkpoint).read_metadata()
    name = next(name for name in metadata.state_dict_metadata if name.endswith("norm.weight"))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))


def poison_place(checkpoint: Path) -> None:
    metadata = TensorReader(checkpoint).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../../" + info.relative_path
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


POISON: dict[str, tuple[Callable[[Path], None], str]] = {
    "a class of the user's": (
        lambda c: poison_metadata(c, Hostile()),
        "which no checkpoint of a run holds; nothing of",
    ),
    "a function of Python": (lambda c: poison_metadata(c, Evaluating()), r"names builtins\.eval, which no checkpoint"),
    "bytes for a tensor": (poison_entry, "BytesStorageMetadata, which no checkpoint of a run holds"),
    "a file elsewhere": (poison_place, "a file outside of the checkpoint"),
    "no pickle": (spoil_metadata, "cannot be read"),
}


@pytest.mark.parametrize("how", POISON)
def test_a_hostile_checkpoint_is_refused_by_every_reader(how: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    poison, message = POISON[how]
    poison(newest(copy))
    resign(newest(copy))
    with pytest.raises(UserError, match=message):
        TensorReader(newest(copy)).read_metadata()

    with pytest.raises(AssertionError, match=r"UserError: checkpoint .* is damaged"):
        export_of(copy, copy / "out", checkpoint="step_00000004")
    resumed = [f"run.resume={newest(copy)}", "train.steps=6"]
    with pytest.raises(AssertionError, match=r"UserError: checkpoint .* is damaged"):
        train_on(1, overrides(copy, *resumed, run="other"))
    train_on(1, overrides(copy, "train.steps=5"))  # the run itself goes on from the one before
    assert len(losses(copy / "run")) == 5
    assert not (copy / MARK).exists()


def test_tensors_are_read_as_tensors_alone(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    (file,) = newest(copy).glob("__0_*.distcp")
    torch.save(Hostile(), file)
    resign(newest(copy))
    with pytest.raises(AssertionError):
        train_on(1, overrides(copy, "train.steps=5"))
    assert not (copy / MARK).exists()


def test_checkpoints_without_manifests_are_damaged_and_stay(copy: Path) -> None:
    before = losses(copy / "run")
    for manifest in (copy / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(AssertionError, match=r"UserError: every checkpoint in .* is damaged; restore one, or choose"):
        train_on(1, overrides(copy, "train.steps=5"))
    assert newest(copy).is_dir() and losses(copy / "run") == before


def test_what_was_just_written_is_kept_and_damaged_ones_go_first(copy: Path) -> None:
    (newest(copy) / "state.json").write_text("{}")
    train_on(1, overrides(copy, "train.steps=3", "checkpoint.keep=1"))
    assert sorted(path.name for path in (copy / "run" / "checkpoints").glob("step_*")) == ["step_00000003"]


def test_with_two_kept_the_damaged_one_between_goes_before_an_older_whole_one(copy: Path) -> None:
    """4 is damaged, the run goes on from 2 and stops at 3: of 2, 3 and 4 it is 4 that goes."""
    (newest(copy) / "state.json").unlink()
    train_on(1, overrides(copy, "train.steps=3", "checkpoint.keep=2"))
    names = sorted(path.name for path in (copy / "run" / "checkpoints").glob("step_*"))
    assert names == ["step_00000002", "step_00000003"]
    assert (copy / "run" / "checkpoints" / "LATEST").read_text() == "step_00000003"


def test_a_damaged_checkpoint_is_written_anew_when_its_step_comes_again(copy: Path) -> None:
    before = losses(copy / "run")
    (newest(copy) / ".metadata").write_bytes(b"")
    train_on(1, overrides(copy, "train.steps=4", "checkpoint.keep=1"))
    assert [path.name for path in (copy / "run" / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert damage(newest(copy), 0, 1) is None and losses(copy / "run") == before


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_file_that_is_shown_late_is_no_damage(name: str, copy: Path) -> None:
    checkpoint, aside = newest(copy), copy / "aside"
    (checkpoint / name).rename(aside)
    assert damage(checkpoint, 0, 1) is not None
    shown = threading.Timer(0.5, lambda: aside.rename(checkpoint / name))
    shown.start()
    assert damage(checkpoint, 0, 1, patience=20) is None
    shown.join()


def test_a_checkpoint_that_was_moved_and_linked_back_stays(copy: Path, tmp_path: Path) -> None:
    checkpoints = copy / "run" / "checkpoints"
    shutil.move(checkpoints / "step_00000002", tmp_path / "archive")
    (checkpoints / "step_00000002").symlink_to(tmp_path / "archive")
    (checkpoints / ".step_00000099.partial").mkdir()
    (checkpoints / ".step_00000099.partial" / "mine.txt").write_text("kept")
    train_on(1, overrides(copy, "train.steps=6", "checkpoint.every=1", "checkpoint.keep=1"))
    assert (tmp_path / "archive" / "manifest.json").exists() and (checkpoints / "step_00000002").is_symlink()
    assert (checkpoints / ".step_00000099.partial" / "mine.txt").read_text() == "kept"
    assert (checkpoints / "step_00000006").is_dir()


def test_values_that_are_not_finite_are_not_saved(copy: Path) -> None:
    with pytest.raises(AssertionError, match="holds values that are not finite after step 5, so this"):
        train_on(1, overrides(copy, "train.steps=5", "optimizer.lr=1e39", "schedule.name=constant"))
    assert sorted(path.name for path in (copy / "run" / "checkpoints").glob("step_*"))[-1] == "step_00000004"
    train_on(1, overrides(copy, "train.steps=5"))
    assert len(losses(copy / "run")) == 5


def test_the_way_back_from_spoilt_weights_is_named_and_can_be_gone(copy: Path) -> None:
    train_on(1, overrides(copy, "train.steps=5", "optimizer.lr=1e30", "schedule.name=constant"))
    spoilt = copy / "run" / "checkpoints" / "step_00000005"
    with pytest.raises(AssertionError, match=rf"those of {spoilt} give it already; delete that folder"):
        train_on(1, overrides(copy, "train.steps=6"))
    shutil.rmtree(spoilt)
    train_on(1, overrides(copy, "train.steps=6"))
    assert len(losses(copy / "run")) == 6


def test_random_damage_to_manifests_is_damage(trained: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(newest(trained), tmp_path / "step_00000004"))
    draw, whole = random.Random(0), json.loads((checkpoint / "manifest.json").read_text())
    assert damage(checkpoint, 0, 1) is None
    for _ in range(300):
        changed = json.loads(json.dumps(whole))
        holder = draw.choice([changed, changed["files"], *changed["files"].values()])
        key = draw.choice([*holder])
        if draw.random() < 0.3:
            holder["other" if draw.random() < 0.5 else "byues"] = holder.pop(key)
        else:
            holder[key] = draw.choice(VALUES)
        text = json.dumps(changed)
        (checkpoint / "manifest.json").write_text(text[: draw.choice((None, None, draw.randrange(len(text))))])
        said = damage(checkpoint, 0, 1)
        assert (said is None) == (text == json.dumps(whole)) or "state.json" not in text, (text, said)


def test_an_export_that_was_cut_short_is_written_anew(copy: Path) -> None:
    out = copy / "out"
    export_of(copy, out)
    written = {path.name: checksum(path) for path in out.iterdir()}
    for name in ("model.safetensors", "config.json"):
        (out / name).write_bytes((out / name).read_bytes()[:-7])
        export_of(copy, out)
        assert {path.name: checksum(path) for path in out.iterdir()} == written


@pytest.mark.parametrize("kind", ["link", "folder", "aside"])
def test_folders_of_others_are_not_replaced(kind: str, copy: Path) -> None:
    mine = copy / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    place = copy / "run" / "export" / "step_00000004"
    place.parent.mkdir()
    if kind == "link":
        place.symlink_to(mine)
    else:
        shutil.copytree(mine, place if kind == "folder" else place.with_name(f".{place.name}.partial"))
    with pytest.raises(AssertionError, match=r"UserError: export to .* failed .*choose another folder or remove it"):
        train_on(1, overrides(copy, "train.steps=4", "export.at_end=true"))
    assert len(list(copy.rglob("thesis.txt"))) == (1 if kind == "link" else 2)


def test_the_tokenizer_of_an_export_begins_texts_as_the_released_one(copy: Path) -> None:
    export_of(copy, copy / "out")
    tokenizer = AutoTokenizer.from_pretrained(copy / "out")
    ids = tokenizer("a text")["input_ids"]
    assert ids[0] == 2 and ids.count(2) == 1
    assert json.loads((copy / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 106, 50]
    assert os.path.getsize(copy / "out" / "tokenizer.json") > 1000


def test_a_monkey_in_the_state_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(newest(trained), tmp_path / "checkpoints" / "step_00000004"))
    (checkpoint / "state.json").write_text("[1]")
    resign(checkpoint)

    def verify(world: World) -> str:
        with pytest.raises(UserError) as caught:
            Checkpointer(tmp_path / "checkpoints", keep=1, asynchronous=False, writing=False).verified(checkpoint)
        return str(caught.value)

    assert "cannot be read (it holds no object)" in run_ranks(1, verify)[0]
