"""From command-line overrides to one checked `Config`.

An unknown key, a wrong type or a value out of its field's bounds raises `ConfigError` with the nearest
valid choice. What keys mean together is for resolve.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import reduce
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from model import ConfigError
from model.errors import nearest
from train.config import Config, OptimizerConfig, SourceConfig
from train.groups import CONFIG_FOLDER, register_by_size
from train.overrides import PATHS, leaves, nearest_key, read_overrides


def load_config(overrides: list[str]) -> Config:
    """Compose `configs/config.yaml` with command-line overrides into a checked Config.

    Raises `ConfigError`.
    """
    cleaned = read_overrides(overrides)
    ConfigStore.instance().store(name="schema", node=Config)
    register_by_size()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base="1.3"):
            composed = compose("config", overrides=cleaned)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{missing[0]} has no value yet; give {missing[0]}=....")
        # Hydra lets `+key=value` add keys of its own; merging into the bare schema refuses them.
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(composed, resolve=True))
        )
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None
    except YAMLError as error:
        raise ConfigError(f"a file of --config-dir is no YAML ({' '.join(str(error).split())[:200]}).") from None
    assert isinstance(config, Config)
    _check_fields(config)
    _expand_homes(config)
    named = {text.partition("=")[0].lstrip("+") for text in cleaned}
    # A length from the command line replaces that of a recipe, whichever unit either has.
    if "train.epochs" in named and "train.steps" not in named:
        config.train.steps = None
    if "train.steps" in named and "train.epochs" not in named:
        config.train.epochs = None
    own_rate = config.optimizer.lr != OptimizerConfig().lr or "optimizer.lr" in named
    if config.model.weights is not None and not own_rate:
        raise ConfigError(
            f"model.weights={config.model.weights} would be trained at optimizer.lr={config.optimizer.lr}, "
            "which suits a tiny model from scratch; set optimizer.lr (1e-5 is usual), or take a recipe such as "
            "+variant=e4b_it."
        )
    return config


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    file = re.match(r"In '(.*)': \w+ raised while composing config:", lines[0])
    message = lines[1 if file else 0].rstrip(".")
    if unknown := re.match(r"Key '(.*)' not in 'SourceConfig'", message):
        section = "data.validation" if key.startswith("data.validation") else "data.sources"
        return f"{section} has no key {unknown[1]}; nearest: {nearest(unknown[1], get_type_hints(SourceConfig))}."
    if file and re.match(r"Key '.*' not in", message):
        if key == file[1].partition("/")[0]:
            return f"{file[1]}.yaml sets keys of a section '{key}'; begin the file with '# @package _global_'."
        return f"{file[1]}.yaml: {key} is no config key; nearest: {nearest_key(key)}."
    if absent := re.search(r"Could not find '(.+?)/(.+)'", message):
        options = re.search(r"Available options in .*:\n((?:\t.*\n?)+)", str(cause))
        names = options[1].split() if options else []
        near = f"; nearest: {nearest(absent[2], names)} (all: {', '.join(names)})" if names else ""
        return f"{absent[1]}={absent[2]} does not exist{near}."
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
            endless = key == "train.max_grad_norm" and value == math.inf
            if isinstance(value, float) and not math.isfinite(value) and not endless:
                raise ConfigError(f"{key}={value} is no finite number; give one.")
            if least is not None and value < least:
                raise ConfigError(f"{key}={value} is too small; smallest legal: {least}.")


def _expand_homes(config: Config) -> None:
    for key in PATHS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, str) and value.startswith("~"):
            setattr(getattr(config, section), name, str(Path(value).expanduser()))
    for source in [*config.data.sources, *config.data.validation]:
        source.path = str(Path(source.path).expanduser()) if source.path.startswith("~") else source.path


def printed(config: Config) -> str:
    """A config as YAML, which a run takes back as a file of keys."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
