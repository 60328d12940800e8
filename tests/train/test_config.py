"""Overrides: what is accepted, and the one line that refuses the rest."""

from __future__ import annotations

import pytest
import yaml

from data.chat.shapes import LineShape
from model import ConfigError
from model.variants import VARIANT_NAMES
from train.groups import CONFIG_FOLDER
from train.load_config import load_config
from train.resolve import line_shape, resolve


def test_no_arguments_is_the_tiny_model() -> None:
    config = load_config([])
    assert config.model.name == "gemma4_tiny_e4b"
    assert resolve(config, 1).model.num_hidden_layers == 12


def test_there_is_a_variant_file_for_every_registered_name() -> None:
    files = {path.stem: path for path in (CONFIG_FOLDER / "variant").glob("*.yaml")}
    assert {f"gemma4_{name}" for name in files} == set(VARIANT_NAMES)
    for name, path in files.items():
        text = path.read_text()
        assert f"+variant={name}" in text, "the header shows the launch line"
        assert yaml.safe_load(text)["model"]["name"] == f"gemma4_{name}"
        config = load_config([f"+variant={name}"])
        assert config.model.name == f"gemma4_{name}"
        assert resolve(config, 1 if name.startswith("tiny") else 8).model.vocab_size in (8192, 262_144)


def test_overrides_win_over_the_variant() -> None:
    config = load_config(["+variant=31b", "model.num_hidden_layers=4", "optimizer.lr=1e-5", "+train.steps=7"])
    assert (resolve(config, 8).model.num_hidden_layers, config.optimizer.lr, config.train.steps) == (4, 1e-5, 7)
    assert resolve(config, 8).model.hidden_size == 5376


def test_sources_are_mixed_or_one() -> None:
    both = "data.sources=[{path: books/*.txt, weight: 3}, {path: chats.jsonl, format: chat}]"
    books, chats = load_config([both]).data.sources
    assert (books.path, books.weight, books.format) == ("books/*.txt", 3.0, None)
    assert (chats.path, chats.weight, chats.format) == ("chats.jsonl", 1.0, "chat")
    with pytest.raises(ConfigError, match=r"data\.source and data\.sources exclude each other; leave one out"):
        resolve(load_config([both, "data.source=texts"]), 1)


def test_a_source_has_a_shape_and_columns_of_its_own_or_those_of_all() -> None:
    own = "data.sources=[{path: a, shape: query}, {path: b, columns: {output: best}}, {path: c, columns: {}}]"
    data = load_config([own, "data.format=chat", "data.shape=alpaca", "data.columns={instruction: q, output: r}"]).data
    assert [line_shape(data, source) for source in (None, *data.sources)] == [
        LineShape("alpaca", {"instruction": "q", "output": "r"}),
        LineShape("query", {"instruction": "q", "output": "r"}),
        LineShape("alpaca", {"output": "best"}),
        LineShape("alpaca", {}),
    ]


BAD = [
    ("train.stepz=3", "train.stepz is no config key; nearest: train.steps."),
    ("+train.stepz=3", "train.stepz is no config key; nearest: train.steps."),
    ("++lr=3", "lr is no config key; nearest: optimizer.lr."),
    ("model.lyers=3", "nearest: model.num_hidden_layers."),
    ("optimizr.lr=3", "nearest: optimizer.lr."),
    ("optimizer.lr=abc", "optimizer.lr=abc has the wrong type; optimizer.lr is a number."),
    ("train.steps=1.5", "train.steps is a whole number or none."),
    ("run.deterministic=maybe", "run.deterministic is true or false."),
    ("+variant=31q", "variant=31q does not exist; nearest: 31b (all: "),
    ("+variant=tiny_31", "nearest: tiny_31b"),
    ("model.name=gemma4_e3b", "nearest: gemma4_e"),
    ("schedule.name=cosin", "nearest: cosine (all: constant, linear, cosine, wsd)."),
    ("run.dtype=float16", "nearest: bfloat16 (all: auto, bfloat16, float32, float64)."),
    ("model.num_key_value_heads=3", "legal here: 1, 2, 4, 8."),
    ("data.sequence_length=9000", "largest legal: 8192."),
    ("train.steps=0", "smallest legal: 1."),
    ("schedule.warmup_steps=1000", "largest legal warm-up: 100."),
    ("schedule.final_lr_ratio=2", "outside 0 to 1."),
    ("data.tokenizer_vocab_size=9000", "largest legal: 8192."),
    ("run.seed=-1", "smallest legal: 0."),
    ("optimizer.beta2=1.5", "lies outside 0 to 1"),
    ("optimizer.eps=0", "must be above 0"),
    ("train.max_grad_norm=0", "set it to inf."),
    ("train.sample_prompts=[]", "set train.sample_every=0."),
    ("model.sliding_window_pattern=0", "must be at least 1."),
    ("model.pad_token_id=9000", "lies outside vocab_size=8192."),
    ("data.sources=[{path: a, wieght: 3}]", "data.sources has no key wieght; nearest: weight."),
    ("data.sources=[{path: a, weight: x}]", "weight=x has the wrong type; weight is a number."),
    ("data.sources=[{path: a, weight: 1}, {path: b, weight: 0}]", "a weight of 0.0; give a number above 0."),
    ("data.sources=[{path: a}, {weight: 2}]", "data.sources[1] has no path; name a file"),
    ("data.sources=[{path: a, format: chta}]", "data.sources[0].format=chta does not exist; nearest: chat (all"),
    (
        "data.sources=[{path: a, format: chat, shape: alpca}]",
        "data.sources[0].shape=alpca does not exist; nearest: al",
    ),
    ("data.sources=[{path: a, format: chat, columns: {outptu: b}}]", "columns={outptu: b} names nothing that is read;"),
    ("data.sources=[{path: a, shape: query}]", "data.sources[0] has a shape or columns, which are for conversations;"),
    (
        "data.columns={output: b}",
        "data.shape and data.columns are for conversations; set data.format=chat, or",
    ),
    ("data.shape=query", "data.shape and data.columns are for conversations; set data.format=chat, or leave them out."),
    ("data.columns=output", "data.columns is a section, not a key; set its keys, as in data.columns.output=...."),
    ("data.temperature=2", "data.temperature weighs several sources; give data.sources, or leave it out."),
    ("data.on_long=drop", "data.on_long=drop is for conversations, and data.packing cuts texts; leave it out, or set"),
    ("data.max_media_tokens=9", "data.max_media_tokens=9 is for conversations with media; leave it out, or set"),
    ("data.cache_media=true", "data.cache_media=true is for conversations with media; leave it out, or set"),
    ("data.sources=a", "data.sources: "),
    ("nonsense", "is not KEY=VALUE"),
    ("~train.steps", "a run takes plain KEY=VALUE, and -m sweeps."),
    ("train.steps=1,2", "a run takes plain KEY=VALUE, and -m sweeps."),
    ("train=3", "train is a section, not a key"),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[override for override, _ in BAD])
def test_bad_overrides_are_refused_in_one_line_with_the_nearest_choice(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(load_config([override]), 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_of_texts_and_of_conversations_need_a_source_of_theirs() -> None:
    chats, both = ["data.format=chat"], ["data.sources=[{path: a}, {path: b, format: chat}]"]
    seeing = [*chats, "model.vision=train"]
    for given, key, message in (
        (chats, "data.packing=best_fit", "data.packing=best_fit is for texts, and conversations are packed whole;"),
        (chats, "data.cache_media=true", "data.cache_media=true is for conversations with media;"),
        (seeing, "data.max_media_tokens=256", "limits nothing, as a sequence has data.sequence_length=256 tokens; l"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(load_config([*given, key]), 1)
    resolve(load_config([*both, "data.packing=best_fit", "data.on_long=drop"]), 1)
    resolve(load_config([*chats, "data.validation=[{path: a, format: text}]", "data.packing=best_fit"]), 1)
    resolve(load_config([*seeing, "data.max_media_tokens=255", "data.cache_media=true"]), 1)
