"""Groups of a config: the numbers of every variant and recipe, which choice wins, and folders of the user's own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from model import ConfigError
from train.config import Config
from train.groups import CONFIG_FOLDER, Groups
from train.load_config import load_config
from train.resolve import resolve

PRETRAIN = ("wsd", 10000, None, 8192, 0.1)
FINETUNE = ("cosine", None, 3.0, 4096, 0.01)
VARIANTS = {  # rate, sequences a step; schedule, steps, epochs, length, decay; tp, ep
    "e2b": (4e-4, 128, PRETRAIN, 1, 1),
    "e4b": (3e-4, 256, PRETRAIN, 1, 1),
    "12b": (3e-4, 512, PRETRAIN, 1, 1),
    "26b_a4b": (3e-4, 512, PRETRAIN, 1, 8),
    "31b": (2e-4, 512, PRETRAIN, 2, 1),
    "e2b_it": (2e-5, 32, FINETUNE, 1, 1),
    "e4b_it": (2e-5, 32, FINETUNE, 1, 1),
    "12b_it": (1e-5, 32, FINETUNE, 1, 1),
    "26b_a4b_it": (1e-5, 64, FINETUNE, 1, 8),
    "31b_it": (1e-5, 32, (*FINETUNE[:4], 0.0), 2, 1),
    **dict.fromkeys(
        ("tiny_e2b", "tiny_e4b", "tiny_12b", "tiny_26b_a4b", "tiny_31b"),
        (5e-3, 16, ("cosine", None, None, 256, 0.1), 1, 1),
    ),
}


def length_and_schedule(config: Config) -> tuple[str, int | None, float | None, int, float]:
    train = config.train
    return config.schedule.name, train.steps, train.epochs, config.data.sequence_length, config.optimizer.weight_decay


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_alone_has_its_recipe_s_numbers(variant: str) -> None:
    config = load_config([f"+variant={variant}"])
    rate, sequences, length, tp, ep = VARIANTS[variant]
    assert (config.optimizer.lr, config.train.global_batch_size) == (rate, sequences)
    assert length_and_schedule(config) == length
    assert (config.parallel.tp, config.parallel.ep, config.data.format) == (tp, ep, "text")
    released = not variant.startswith("tiny")
    assert (config.train.micro_batch_size, config.train.sample_every) == ((1, 0) if released else (8, 50))
    assert config.activation_checkpoint.mode == ("full" if released else "none")
    assert config.parallel.gradient_sync == ("every" if released else "last")
    saved = config.checkpoint
    assert (saved.every, saved.every_minutes, saved.asynchronous) == ((50, 30, True) if released else (50, 0, False))
    assert config.data.workers == (2 if released else 0)


RECIPES = {  # rate and sequences a step of the base e4b and 31b; format, vision, audio
    "pretrain": ((3e-4, 256), (2e-4, 512), PRETRAIN, ("text", None, None)),
    "continue_pretrain": ((7.5e-5, 256), (5e-5, 512), ("linear", 2000, None, 8192, 0.1), ("text", "freeze", None)),
    "finetune": ((2e-5, 32), (5e-6, 32), FINETUNE, ("text", None, None)),
    "sft": ((2e-5, 32), (5e-6, 32), FINETUNE, ("chat", None, None)),
    "vision_sft": ((1e-5, 32), (1e-5, 32), ("cosine", None, 2.0, 4096, 0.01), ("chat", "projector", None)),
    "image_caption": ((2e-5, 32), (2e-5, 32), ("cosine", None, 2.0, 2048, 0.01), ("chat", "projector", None)),
    "audio_transcription": ((1e-5, 32), (1e-5, 32), FINETUNE, ("chat", None, "projector")),
    "video": ((1e-5, 16), (1e-5, 16), ("cosine", None, 2.0, 8192, 0.01), ("chat", "projector", None)),
}


def test_there_is_a_row_for_every_file() -> None:
    files = {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in CONFIG_FOLDER.glob("*/")}
    assert files.pop("variant") == set(VARIANTS)
    assert files.pop("recipe") == set(RECIPES)
    files.pop("__pycache__", None)
    assert files == {
        "data": {"chat", "crawl"},
        "schedule": {"constant", "linear", "cosine", "wsd"},
        "checkpoint": {"frequent", "minutes", "end"},
        "cluster": {"one_gpu", "one_node", "nodes"},
    }
    for path in CONFIG_FOLDER.glob("*/*.yaml"):
        lines = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
        assert any(f"{path.parent.name}={path.stem}" in line for line in lines), f"{path}: no launch line"
    places = [
        next(iter(entry)) for entry in yaml.safe_load((CONFIG_FOLDER / "config.yaml").read_text())["defaults"][1:-1]
    ]
    assert places == ["recipe", "variant", "data", "schedule", "checkpoint", "cluster", "experiment"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_replaces_that_of_the_variant(recipe: str) -> None:
    *numbers, length, media = RECIPES[recipe]
    for variant, expected in zip(("e4b", "31b"), numbers, strict=True):
        config = load_config([f"+recipe={recipe}", f"+variant={variant}"])
        assert (config.optimizer.lr, config.train.global_batch_size) == expected
        assert config.model.name == f"gemma4_{variant}" and config.parallel.tp == (2 if variant == "31b" else 1)
        decay = 0.0 if variant == "31b" and recipe in ("finetune", "sft", "audio_transcription") else length[-1]
        assert length_and_schedule(config) == (*length[:-1], decay)
        assert (config.data.format, config.model.vision, config.model.audio) == media


def test_no_order_of_choices_and_keys_matters() -> None:
    assert load_config(["variant=31b", "recipe=sft"]) == load_config(["+recipe=sft", "+variant=31b"])
    words = ["+variant=31b", "+recipe=sft", "schedule=wsd", "checkpoint=minutes", "optimizer.lr=3e-6"]
    found = [load_config(list(order)) for order in itertools.islice(itertools.permutations(words), 0, 120, 29)]
    assert all(config == found[0] for config in found)
    assert (found[0].schedule.name, found[0].schedule.final_lr_ratio) == ("wsd", 0.0)
    assert (found[0].checkpoint.every, found[0].checkpoint.every_minutes, found[0].optimizer.lr) == (0, 10, 3e-6)
    assert load_config(["+variant=31b", "+variant=e4b"]).model.name == "gemma4_e4b", "the last choice of a group counts"


def test_machines_change_what_the_size_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*words: str) -> tuple[object, ...]:
        config = load_config([*words, "+variant=" + words[0]][1:])
        plan = config.parallel
        return plan.tp, plan.ep, plan.cpu_offload, config.optimizer.state_dtype, config.model.per_layer_table

    assert found("e2b", "cluster=one_gpu") == (1, 1, False, "float8", "train")
    assert found("e4b_it", "cluster=one_gpu") == (1, 1, False, "float8", "freeze")
    assert found("26b_a4b", "cluster=one_gpu") == (1, 1, True, "float32", "train")
    modes = {v: load_config([f"+variant={v}", "cluster=one_node"]).activation_checkpoint.mode for v in ("e4b", "31b")}
    assert modes == {"e4b": "none", "31b": "full"}
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    assert str(resolve(load_config(["+variant=31b", "cluster=nodes"]), 32).layout) == (
        "dp_replicate 4 x dp_shard 4 x tp 2, sequence parallel"
    )


def test_numbers_follow_the_size_and_not_the_name_alone() -> None:
    def sequences(*words: str) -> int:
        return load_config(["+recipe=sft", *words]).train.global_batch_size

    assert (sequences(), sequences("+variant=tiny_26b_a4b"), sequences("model.name=gemma4_26b_a4b")) == (16, 16, 64)
    assert sequences("model.weights=google/gemma-4-26B-A4B-it") == 32, (
        "weights whose variant is not named are no tiny ones"
    )


GLOBAL = "# @package _global_\n"
EXPERIMENT = """\
# @package _global_
defaults:
  - _self_
  - override /variant: e4b_it
  - override /recipe: sft
train:
  global_batch_size: 4
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "my own" / "experiment").mkdir(parents=True)
    (tmp_path / "my own" / "schedule").mkdir()
    (tmp_path / "my own" / "experiment" / "chats.yaml").write_text(EXPERIMENT)
    (tmp_path / "my own" / "schedule" / "short.yaml").write_text("name: linear\nwarmup_steps: 3\n")
    return tmp_path / "my own"


def test_a_folder_of_one_s_own_adds_choices(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["--config-dir", str(mine), "+experiment=chats"])
    assert (config.model.name, config.optimizer.lr, config.data.format) == ("gemma4_e4b_it", 2e-5, "chat")
    assert config.train.global_batch_size == 4
    (mine / "ablation").mkdir()
    (mine / "ablation" / "001.yaml").write_text(GLOBAL + "train: {steps: 5}\n")
    assert load_config(["--config-dir", str(mine), "+ablation='001'"]).train.steps == 5
    monkeypatch.chdir(mine.parent)
    words = [
        "--config-dir=my own",
        "experiment=chats",
        "recipe=pretrain",
        "schedule=short",
        "train.global_batch_size=8",
    ]
    config = load_config(words)
    assert (config.model.name, config.optimizer.lr, config.train.steps) == ("gemma4_e4b_it", 3e-4, 10000)
    assert (config.schedule.name, config.schedule.warmup_steps, config.train.global_batch_size) == ("linear", 3, 8)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("experiment/a", "train: {steps: 3}", "experiment/a.yaml sets keys of a section 'experiment'; begin the file"),
        ("experiment/a", GLOBAL + "train: {stepz: 3}", "a.yaml: train.stepz is no config key; nearest: train.steps"),
        (
            "experiment/a",
            GLOBAL + "train: {steps: x}",
            "train.steps=x has the wrong type; train.steps is a whole number",
        ),
        ("experiment/a", "train: {steps: [", "a file of --config-dir is no YAML"),
        ("experiment/a", GLOBAL + "defaults: [_self_, override /variant: e4q]", "e4q does not exist; nearest: e4b"),
        ("experiment/a", GLOBAL + "optimizer: {lr: '${by_size:{e5b: 3}, 4}'}", "by_size has no e5b; nearest: e"),
        ("recipe/sft", "", "recipe/sft.yaml has the name of another recipe=sft, which is taken in its place; rename"),
    ],
)
def test_a_mistake_in_one_s_own_file_is_one_sentence(mine: Path, file: str, text: str, message: str) -> None:
    (mine / file).parent.mkdir(exist_ok=True)
    (mine / f"{file}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["--config-dir", str(mine), "+experiment=a"])
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_what_does_not_exist_is_named_with_all_that_does(mine: Path) -> None:
    own, groups = ["--config-dir", str(mine)], "checkpoint, cluster, data, recipe, schedule, variant"
    with_own = "checkpoint, cluster, data, experiment, recipe, schedule, variant"
    schedules = "constant, cosine, linear, short, wsd"
    for words, message in (
        ([*own, "+experiment=chat"], "experiment=chat does not exist; nearest: chats (all: chats)."),
        ([*own, "schedule=shrt"], f"schedule=shrt does not exist; nearest: short (all: {schedules})."),
        ([*own, "+experimnt=chats"], f"experimnt is no config group; nearest: experiment (all: {with_own})."),
        (["+recip=sft"], f"recip is no config group; nearest: recipe (all: {groups})."),
        (
            ["+experiment=chats"],
            f"experiment is no config group; groups: {groups}. One of your own is a folder in that",
        ),
        (["--config-dir", "/nowhere"], "--config-dir /nowhere is no folder; name the one that holds experiment/mine."),
        (["--config-dir"], "--config-dir takes a path after it"),
        (["variant@model=e4b"], "'variant@model=e4b' names a package; a choice is variant=NAME."),
        (["data=3"], "data is a section, not a key; set its keys, as in data.source=...."),
        (["data.source=???"], "data.source has no value yet; give data.source=...."),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(words)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert load_config(["data={format: chat}"]).data.format == "chat", "a section may have the name of a group"
    assert "schedule" in Groups([]) and "experiment" not in Groups([])


def test_a_file_may_choose_groups_and_comes_before_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n- variant: e4b_it\n- override /recipe: sft\n- _self_\ntrain: {steps: 7}\n")
    for words in (["--config", str(file)], [f"--config={file}"], [str(file)]):
        config = load_config(words)
        assert (config.model.name, config.data.format, config.train.steps) == ("gemma4_e4b_it", "chat", 7)
        assert config.train.epochs is None
    config = load_config(["train.steps=9", "+recipe=pretrain", "--config", str(file)])
    assert (config.train.steps, config.data.format, config.model.name) == (9, "text", "gemma4_e4b_it")
    file.write_text("variant: 12b\ntrain: {steps: 7}\n")
    assert load_config([str(file)]).model.name == "gemma4_12b"
    file.write_text("defaults: {variant: [e4b]}\n")
    with pytest.raises(
        ConfigError, match=r"mine\.yaml: defaults has .*; write a list of GROUP: NAME, as in '- variant: e"
    ):
        load_config(["--config", str(file)])
