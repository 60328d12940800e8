"""From command-line overrides to one checked `Config`.

An unknown key, a wrong type or a size that does not fit raises `ConfigError` with the nearest
valid choice, before anything is built.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import configs
from data.corpus.mixture import whole_parts
from model import ConfigError, Gemma4Config
from model.errors import nearest
from parallel.cut import SCHEDULES, check_pipeline
from parallel.layout import Layout
from parallel.mesh import DEVICES, DTYPES, micro_batch_size
from train.config import ENCODERS, EXPORT_DTYPES, Config, DataConfig, ModelConfig, SourceConfig
from train.objective import OBJECTIVES

CONFIG_FOLDER = Path(configs.__file__).parent
GROUPS = ("variant",)
_RECIPE = ("variant=", "optimizer.lr=")

CHOICES = {
    "run.device": DEVICES,
    "run.dtype": DTYPES,
    "train.objective": tuple(OBJECTIVES),
    "data.format": ("text", "chat"),
    "parallel.gradient_sync": ("last", "every"),
    "parallel.pp_schedule": SCHEDULES,
    "float8.recipe": ("none", "tensorwise", "rowwise"),
    "schedule.name": ("constant", "linear", "cosine", "wsd"),
    "activation_checkpoint.mode": ("none", "full", "selective"),
    "export.dtype": EXPORT_DTYPES,
    "model.vision": ("none", "freeze", "projector", "train"),
    "model.audio": ("none", "freeze", "projector", "train"),
    "trackers.wandb.mode": ("disabled", "offline", "online"),
}
_AT_LEAST = {
    "run.seed": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "train.z_loss": 0,
    "train.steps": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.log_every": 1,
    "train.sample_every": 0,
    "train.sample_tokens": 1,
    "data.sequence_length": 2,
    "data.workers": 0,
    "parallel.pp_virtual": 2,
    "train.moe_balance_loss": 0,
    "train.moe_router_z_loss": 0,
    "schedule.warmup_steps": 0,
    "schedule.decay_steps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "export.every": 0,
    "activation_checkpoint.every": 1,
}


def load_config(overrides: list[str]) -> Config:
    """Compose `configs/config.yaml` with command-line overrides into a checked Config.

    Raises `ConfigError`.
    """
    cleaned = [_checked(override) for override in _parse(overrides)]
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base="1.3"):
            composed = compose("config", overrides=cleaned)
        # Hydra lets `+key=value` add keys of its own; merging into the bare schema refuses them.
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(composed, resolve=True))
        )
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None
    assert isinstance(config, Config)
    _validate(config)
    if config.weights is not None and not any(text.lstrip("+").startswith(_RECIPE) for text in cleaned):
        raise ConfigError(
            f"model.weights={config.model.weights} would be trained at optimizer.lr={config.optimizer.lr}, "  # type: ignore[attr-defined]
            "which suits a tiny model from scratch; set optimizer.lr (1e-5 is usual), or take a recipe such as "
            "+variant=e4b_it."
        )
    return config


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException:
            raise ConfigError(
                f"'{text}' is not KEY=VALUE or +variant=NAME; quote values with special characters."
            ) from None
    return parsed


def _checked(override: Override) -> str:
    """The override as Hydra wants it, after its key and group choice were found to exist."""
    key, text = override.key_or_group, override.input_line or ""
    if override.is_delete() or override.is_sweep_override():
        raise ConfigError(f"'{text}' deletes or sweeps; a run takes plain KEY=VALUE.")
    if key in GROUPS:
        names = sorted(path.stem for path in (CONFIG_FOLDER / key).glob("*.yaml"))
        if str(override.value()) not in names:
            near = nearest(str(override.value()), names)
            raise ConfigError(f"{key}={override.value()} does not exist; nearest: {near} (all: {', '.join(names)}).")
        return f"+{key}={override.value()}"
    keys = dict(_leaves(Config))
    if key not in keys:
        raise ConfigError(f"{key} is no config key; nearest: {max(keys, key=lambda k: _likeness(key, k))}.")
    return text.lstrip("+")


def _leaves(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of every key."""
    hints = (
        get_type_hints(schema) if schema is not ModelConfig else {f.name: f.type for f in dataclasses.fields(schema)}
    )
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _likeness(wrong: str, key: str) -> float:
    """How well a mistyped key fits a real one: by its last part, or a word of it, then by the section."""

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    (section, _, name), (wrong_section, _, wrong_name) = key.rpartition("."), wrong.rpartition(".")
    by_word = max(ratio(wrong_name, word) for word in name.split("_"))
    return max(ratio(wrong_name, name), 0.9 * by_word) + 0.3 * ratio(section, wrong_section)


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    message = lines[0].rstrip(".")
    if unknown := re.match(r"Key '(.*)' not in 'SourceConfig'", message):
        return f"data.sources has no key {unknown[1]}; nearest: {nearest(unknown[1], get_type_hints(SourceConfig))}."
    if re.match(r"Value .* (could not be converted|is not a valid)", message):
        expected = dict([*_leaves(SourceConfig), *_leaves(Config)]).get(key)
        value = re.search(r"'(.*?)'", message)
        return f"{key}={value[1] if value else '?'} has the wrong type; {key} is {_type_name(expected)}."
    return f"{key}: {message}." if key else f"{message}."


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("none" if arg is type(None) else _type_name(arg) for arg in get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, str(hint).replace("list[str]", "a list of texts"))


def get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _validate(config: Config) -> None:
    for key, choices in CHOICES.items():
        if get(config, key) is None:
            continue
        if get(config, key) not in choices:
            near = nearest(get(config, key), choices)
            raise ConfigError(f"{key}={get(config, key)} does not exist; nearest: {near} (all: {', '.join(choices)}).")
    for key, least in _AT_LEAST.items():
        if (get(config, key) if get(config, key) is not None else least) < least:
            raise ConfigError(f"{key}={get(config, key)} is too small; smallest legal: {least}.")
    _check_sources(config.data)
    model, schedule, steps = config.gemma4(), config.schedule, config.train.steps
    if config.weights is not None:
        _check_variant(config)
    for encoder in ENCODERS:
        wanted = get(config, f"model.{encoder}")
        if wanted not in (None, "none") and getattr(model, encoder) is None:
            raise ConfigError(f"model.{encoder}={wanted}, but this model has no {encoder} encoder; legal: none.")
        if wanted in ("freeze", "projector") and config.weights is None:
            raise ConfigError(
                f"model.{encoder}={wanted} would keep a tower of random weights; give model.weights, or set train."
            )
    if config.run.dtype == "float64" and config.float8.recipe != "none":
        raise ConfigError(
            f"float8.recipe={config.float8.recipe} rounds what run.dtype=float64 would prove; set float8.recipe=none."
        )
    if config.data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} exceeds the model's max_position_embeddings; "
            f"largest legal: {model.max_position_embeddings}."
        )
    tail = (schedule.decay_steps or 0) if schedule.name == "wsd" else 0
    if (schedule.warmup_steps or 0) + tail > steps:
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} and decay take more than train.steps={steps}; "
            f"largest legal warm-up: {max(steps - tail, 0)}."
        )
    if not 0.0 <= schedule.final_lr_ratio <= 1.0:
        raise ConfigError(f"schedule.final_lr_ratio={schedule.final_lr_ratio} lies outside 0 to 1.")
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0.0 <= get(config, key) < 1.0:
            raise ConfigError(f"{key}={get(config, key)} lies outside 0 to 1 (1 excluded).")
    if config.optimizer.eps <= 0:
        raise ConfigError(f"optimizer.eps={config.optimizer.eps} must be above 0; usual: 1e-8.")
    if config.train.max_grad_norm <= 0:
        raise ConfigError(
            f"train.max_grad_norm={config.train.max_grad_norm} zeroes every gradient; for no clipping set it to inf."
        )
    if config.train.sample_every and not config.train.sample_prompts:
        raise ConfigError("train.sample_prompts is empty; give one, or set train.sample_every=0.")
    if config.tokenizer is None and config.data.tokenizer_vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer_vocab_size={config.data.tokenizer_vocab_size} exceeds model.vocab_size; "
            f"largest legal: {model.vocab_size}."
        )


def _check_sources(data: DataConfig) -> None:
    if data.sources and data.source != DataConfig().source:
        raise ConfigError("data.source and data.sources exclude each other; leave one out.")
    for i, source in enumerate(data.sources):
        if not source.path:
            raise ConfigError(
                f"data.sources[{i}] has no path; name a file, folder or glob, as in {{path: texts, weight: 2}}."
            )
        if source.format not in (None, *CHOICES["data.format"]):
            near = nearest(str(source.format), CHOICES["data.format"])
            raise ConfigError(f"data.sources[{i}].format={source.format} does not exist; nearest: {near}.")
    if data.sources:
        whole_parts([source.weight for source in data.sources])


def _check_variant(config: Config) -> None:
    """A recipe of one variant must not run on the weights of another unnoticed."""
    name, weights = config.model.name, config.model.weights  # type: ignore[attr-defined]
    if name == ModelConfig().name:  # none was named
        return
    assert config.weights is not None
    named, found = Gemma4Config.from_name(name), Gemma4Config.from_hf(config.weights)
    for size in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if getattr(named, size) != getattr(found, size):
            raise ConfigError(
                f"model.weights={weights} has {size}={getattr(found, size)}, but model.name={name} has "
                f"{getattr(named, size)}; take the variant of the weights, or none."
            )


def check_layout(config: Config, world_size: int) -> Layout:
    """The mesh of a run, after everything that depends on it was found to fit. Raises `ConfigError`."""
    layout = config.layout(world_size)
    train, parallel = config.train, config.parallel
    micro = micro_batch_size(train.global_batch_size, train.micro_batch_size, layout.dp, layout.pp)
    if layout.pp > 1:
        if train.sample_every:
            raise ConfigError(
                f"train.sample_every={train.sample_every} needs every layer on each rank, unlike "
                f"parallel.pp={layout.pp}; nearest legal: train.sample_every=0."
            )
        check_pipeline(
            parallel.pp_schedule,
            parallel.pp_virtual,
            layout.pp,
            config.gemma4().num_hidden_layers,
            train.global_batch_size // (layout.dp * micro),
            config.float8.recipe,
        )
    return layout
