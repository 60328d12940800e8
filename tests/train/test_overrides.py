"""Every way to say what a run is to do: words, sections, files, and what looks like one."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from model import ConfigError
from tests.harness.fuzz import VALUES
from tests.harness.processes import MAIN
from train.config import Config
from train.load_config import get, load_config, printed
from train.overrides import leaves


def test_a_section_is_its_keys() -> None:
    config = load_config(["train={steps: 3, epochs: null}", "activation_checkpoint={mode: full}"])
    assert (config.train.steps, config.train.global_batch_size, config.activation_checkpoint.mode) == (3, 16, "full")
    assert load_config(["trackers={wandb: {tags: [a, 'b c']}}"]).trackers.wandb.tags == ["a", "b c"]
    with pytest.raises(ConfigError, match=r"train\.stepz is no config key; nearest: train\.steps"):
        load_config(["train={stepz: 3}"])
    with pytest.raises(ConfigError, match=r"train is a section, not a key; set its keys, as in train\.steps=\.\.\."):
        load_config(["train=3"])


def test_columns_are_a_section_whose_keys_are_the_users(tmp_path: Path) -> None:
    columns = {"instruction": "the question", "output": "3"}
    whole = load_config(["data.columns={instruction: the question, output: 3}"])
    assert whole.data.columns == columns
    assert (
        load_config(["data={columns: {output: 3}}", "+data.columns.instruction=the question"]).data.columns == columns
    )
    (tmp_path / "config.yaml").write_text(printed(whole))
    assert load_config([str(tmp_path / "config.yaml")]) == whole


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config-path=mine", "there is one config folder; one of your own beside it is named by --config-dir FOLDER"),
        ("--config-name=mine", "there is no config to name; keys of your own go into a file"),
        ("--config", "--config takes a path after it"),
        ("-m", "it starts the runs of a sweep, and goes with train alone"),
        ("--multirun", "it starts the runs of a sweep, and goes with train alone"),
        ("--cfg", "takes the word job after it"),
        ("--lr", "--lr is no option; a run takes plain KEY=VALUE"),
        ("+experiment=mine", "experiment is no config group; groups: checkpoint, cluster, data"),
        ("hydra.run.dir=x", "is no config group"),
        ("nowhere.yaml", "nowhere.yaml cannot be read as YAML"),
    ],
)
def test_what_other_programs_take_says_what_does_it_here(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([word])
    assert "\n" not in str(caught.value)


def test_a_file_of_keys_stands_where_it_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("train:\n  steps: 7\n  max_grad_norm: .inf\ndata:\n  sources:\n  - path: a'b c\n    weight: 2\n")
    config = load_config([str(mine), "train.steps=9"])
    assert (config.train.steps, config.train.max_grad_norm) == (9, float("inf"))
    assert [(source.path, source.weight) for source in config.data.sources] == [("a'b c", 2.0)]
    assert load_config(["train.steps=9", str(mine)]).train.steps == 7
    mine.write_text("train:\n  stepz: 7\n")
    with pytest.raises(ConfigError, match=r"train\.stepz is no config key; nearest: train\.steps"):
        load_config([str(mine)])
    for bad in ("[1, 2]", "train: {steps: [", "just words"):
        mine.write_text(bad)
        with pytest.raises(ConfigError) as caught:
            load_config([str(mine)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words", [[], ["+variant=e4b_it", "optimizer.lr=1e-5"], ["train.epochs=2", "data.source=a[b]"]]
)
def test_a_run_s_own_config_gives_the_same_config(words: list[str], tmp_path: Path) -> None:
    config = load_config(words)
    (tmp_path / "config.yaml").write_text(printed(config))
    assert load_config([str(tmp_path / "config.yaml")]) == config


def test_the_config_is_printed_when_asked() -> None:
    command = [sys.executable, MAIN, "train.steps=3", "--cfg", "job", "run.seed=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == printed(load_config(["train.steps=3", "run.seed=5"]))


def test_a_length_from_the_command_line_replaces_that_of_a_recipe() -> None:
    rate = "optimizer.lr=1e-5"
    for words, expected in (
        (["+variant=e4b_it"], (None, 3.0)),
        (["+variant=e4b_it", "train.steps=50"], (50, None)),
        (["+variant=e4b_it", "train.steps=50", "train.epochs=1"], (50, 1.0)),
        (["+variant=e4b", "train.epochs=1"], (None, 1.0)),
    ):
        config = load_config([*words, rate])
        assert (config.train.steps, config.train.epochs) == expected


def test_paths_are_taken_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load_config(
        ["run.dir=~/x", "data.source=wiki[en],v{2}.jsonl", "data.cache=a b", "data.sources=[{path: '~/y'}]"]
    )
    assert (config.run.dir, config.data.source, config.data.cache) == ("/home/ada/x", "wiki[en],v{2}.jsonl", "a b")
    assert load_config(["data.sources=[{path: '~/y'}]"]).data.sources[0].path == "/home/ada/y"
    assert load_config(["run.dir='~/x'"]).run.dir == "/home/ada/x"
    assert load_config(["data.tokenizer=null"]).data.tokenizer is None


@pytest.mark.parametrize(
    "word",
    ["train.max_grad_norm=nan", "optimizer.lr=nan", "optimizer.lr=inf", "optimizer.beta1=nan", "train.z_loss=inf"],
)
def test_numbers_are_finite(word: str) -> None:
    with pytest.raises(ConfigError, match="is no finite number; give one"):
        load_config([word])
    assert load_config(["train.max_grad_norm=inf"]).train.max_grad_norm == float("inf")


def test_any_value_for_any_key_is_taken_or_refused_in_one_line() -> None:
    draw, keys, taken = random.Random(0), [key for key, _ in leaves(Config)], 0
    for _ in range(150):
        key, value = draw.choice(keys), draw.choice(VALUES)
        words = [f"{draw.choice(('', '', '+', '++'))}{key}={draw.choice((value, repr(value), str(value).lower()))}"]
        try:
            get(load_config(words), key)
            taken += 1
        except ConfigError as error:
            said = str(error)
            if "\n" in said or not said.endswith("."):
                pytest.fail(f"{words}: {said!r}")
    assert 20 < taken < 140
