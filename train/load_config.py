"""From command-line overrides to one checked `Config`.

An unknown key, a wrong type or a value out of its field's bounds raises `ConfigError` with the nearest
valid choice. What keys mean together is for resolve.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from functools import reduce
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
from model import ConfigError
from model.errors import nearest
from train.config import Config, OptimizerConfig, SourceConfig

CONFIG_FOLDER = Path(configs.__file__).parent
GROUPS = ("variant",)


def load_config(overrides: list[str]) -> Config:
    """Compose `configs/config.yaml` with command-line overrides into a checked Config.

    Raises `ConfigError`.
    """
    parsed = _parse(overrides)
    cleaned = [_checked(override) for override in parsed]
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
    _check_fields(config)
    own_rate = config.optimizer.lr != OptimizerConfig().lr or any(o.key_or_group == "optimizer.lr" for o in parsed)
    if config.model.weights is not None and not own_rate:
        raise ConfigError(
            f"model.weights={config.model.weights} would be trained at optimizer.lr={config.optimizer.lr}, "
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
    keys = dict(leaves(Config))
    if key not in keys:
        raise ConfigError(f"{key} is no config key; nearest: {max(keys, key=lambda k: _likeness(key, k))}.")
    return text.lstrip("+")


def leaves(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of every key."""
    own = get_type_hints(schema)
    # Overrides of the model are made by name, with types that are no text to be looked up.
    for field in dataclasses.fields(schema):
        name, hint = field.name, own[field.name] if isinstance(field.type, str) else field.type
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
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
        expected = dict([*leaves(SourceConfig), *leaves(Config)]).get(key)
        value = re.search(r"'(.*?)'", message)
        return f"{key}={value[1] if value else '?'} has the wrong type; {key} is {_type_name(expected)}."
    return f"{key}: {message}." if key else f"{message}."


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("none" if arg is type(None) else _type_name(arg) for arg in get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, str(hint).replace("list[str]", "a list of texts"))


def get(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def _check_fields(section: Any, prefix: str = "") -> None:
    """Hold every field to the bounds and choices it was declared with."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            _check_fields(value, f"{key}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                _check_fields(item, f"{key}[{index}].")
        elif value is not None:
            choices, least = field.metadata.get("choices"), field.metadata.get("least")
            if choices and value not in choices:
                near = nearest(value, choices)
                raise ConfigError(f"{key}={value} does not exist; nearest: {near} (all: {', '.join(choices)}).")
            if least is not None and value < least:
                raise ConfigError(f"{key}={value} is too small; smallest legal: {least}.")
