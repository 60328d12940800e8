"""What a run says of itself before its first step: its data, its length, and what changed since a checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from data.corpus.open import Data, Settings, Source, open_data
from model import ConfigError
from tests.harness.chat_files import E4B, TOKENIZER, chat, model, user, write, write_media
from tests.harness.runs import overrides
from train.config import Config, ScheduleConfig, TrainConfig
from train.load_config import load_config
from train.resolve import Resolved, resolve
from train.resume import Progress, changes
from train.sampling import sample_prompts
from train.schedule import check_schedule, learning_rate, run_length

MAIN = Path(__file__).resolve().parents[2] / "train" / "main.py"


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(None, None, 100), (7, None, 7), (None, 3.0, 38), (None, 0.01, 1), (7, 3.0, 7), (70, 3.0, 38)],
)
def test_a_run_has_the_fewer_of_its_steps_and_those_of_its_epochs(
    steps: int | None, epochs: float | None, expected: int
) -> None:
    assert run_length(TrainConfig(steps=steps, epochs=epochs, global_batch_size=8), 100) == expected


def test_a_warm_up_longer_than_what_the_data_gives_is_refused() -> None:
    check_schedule(ScheduleConfig(warmup_steps=5), 5)
    with pytest.raises(ConfigError, match="more than the 5 steps of the run; largest legal warm-up: 5"):
        check_schedule(ScheduleConfig(warmup_steps=6), 5)


@pytest.mark.parametrize("epochs", ["0", "-1"])
def test_no_epochs_are_refused(epochs: str) -> None:
    with pytest.raises(ConfigError, match="trains on nothing; give a number above 0"):
        resolve(load_config([f"train.epochs={epochs}"]), 1)


def progress(step: int, steps: int, *arguments: str) -> Progress:
    config: Config = load_config(list(arguments))
    return Progress(step, 0, 0, {}, {}, [], json.loads(json.dumps(asdict(config))), steps)


def test_what_changed_since_a_checkpoint_is_told_with_the_rate_that_follows() -> None:
    saved = progress(100, 100, "optimizer.lr=5e-4", "train.log_every=1", "run.dir=a")
    asked = progress(100, 300, "optimizer.lr=5e-4", "train.log_every=9", "run.dir=b", "train.global_batch_size=32")
    told = changes(saved, asked)
    before = learning_rate(ScheduleConfig(), 5e-4, 99, 100)
    after = learning_rate(ScheduleConfig(), 5e-4, 100, 300)
    assert after > 5 * before
    assert told == [
        "train.global_batch_size 16 -> 32",
        f"the next step's rate is {after:.2e}, by the earlier config {before:.2e}",
    ]


def test_the_same_config_and_a_checkpoint_without_one_tell_nothing() -> None:
    same = progress(3, 100, "optimizer.lr=5e-4")
    assert changes(same, same) == []
    assert changes(Progress(3, 0, 0, {}, {}), same) == []


def chats(folder: Path, *more: str) -> tuple[Resolved, Data]:
    write_media(folder)
    picture = {"type": "image", "path": "cat.png"}
    lines = [chat(user(picture), model())]
    lines += [chat({"role": "user", "content": f"{number}?"}, model()) for number in range(5)]
    write(folder, lines)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    source = folder / "chats.jsonl"
    run = resolve(load_config([f"data.source={source}", "data.format=chat", *more]), 1)
    settings = Settings(E4B, 64, 0, folder / "tokenizer.json", cache=folder / "cache")
    return run, open_data([Source(str(source), 1, "chat")], settings)


def test_samples_of_a_chat_answer_its_first_turns_without_pictures(tmp_path: Path) -> None:
    found = sample_prompts(*chats(tmp_path))
    assert [prompt.text for prompt in found] == [f"<|turn>user\n{n}?<turn|>\n<|turn>model\n" for n in range(3)]
    assert found[0].ids == TOKENIZER.encode("<bos>" + found[0].text, add_special_tokens=False).ids


def test_given_prompts_of_a_chat_are_a_users_turn(tmp_path: Path) -> None:
    (prompt,) = sample_prompts(*chats(tmp_path, "train.sample_prompts=[What is it?]"))
    turn = "<bos><|turn>user\nWhat is it?<turn|>\n<|turn>model\n"
    assert prompt.text == "What is it?"
    assert prompt.ids == TOKENIZER.encode(turn, add_special_tokens=False).ids


def test_the_screen_tells_data_length_and_changes(tmp_path: Path) -> None:
    def said(*more: str) -> list[str]:
        command = [sys.executable, str(MAIN), *overrides(tmp_path, *more)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
        return done.stdout.splitlines()

    first = said("train.steps=2")
    (data,) = (line for line in first if line.startswith("data: "))
    epochs = 2 * 8 * 48 / int(re.findall(r"([\d,]+) tokens", data)[0].replace(",", ""))
    assert data.startswith(f"data: {tmp_path / 'corpus.jsonl'}: 120 documents, ")
    assert data.endswith(f" | {epochs:.2f} epochs in this run")
    folder = tmp_path / "run"
    assert f"run: 2 steps of 8 sequences of 48, 1 x 8 a rank | 768 tokens in all | run folder {folder}" in first
    assert "starts from drawn weights, run.seed=0" in first

    again = said("train.steps=5", "optimizer.lr=7e-4", "train.epochs=99")
    checkpoint = folder / "checkpoints" / "step_00000002"
    start = again.index(f"resumed from {checkpoint} at step 2")
    assert "train.steps ends it before train.epochs=99 would" in again[start - 1]
    assert again[start + 1].startswith(
        "changed since then: train.steps 2 -> 5; train.epochs unset -> 99.0; optimizer.lr 0.0005 -> 0.0007; "
    )
    assert any(re.fullmatch(r"expected: 1 more steps in \d+m\d\ds, .*", line) for line in again)
