"""The words of a command line, and files of keys, made into overrides of config keys that exist."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import configs
from model import ConfigError
from model.errors import nearest
from train.config import Config

CONFIG_FOLDER = Path(configs.__file__).parent
GROUPS = ("variant",)
PATHS = ("run.dir", "run.resume", "model.weights", "data.source", "data.tokenizer", "data.cache")
"""Keys whose values are paths: taken as they are written, a leading `~` is the home folder."""
MAPPINGS = {"data.columns": "output"}
"""Sections in which the keys are a user's, each with an example."""
_FILES = "keys of your own go into a file that is given by its name, as in: train/main.py mine.yaml train.steps=3."
_OPTIONS = {
    **dict.fromkeys(("--config-dir", "-cd", "--config-path", "-cp"), f"there is no config folder to name; {_FILES}"),
    **dict.fromkeys(("--config-name", "-cn"), f"there is no config to name; {_FILES}"),
    **dict.fromkeys(("-m", "--multirun"), "one command is one run; start several one by one, each in its own run.dir."),
    **dict.fromkeys(("--cfg", "-c"), "--cfg takes the word job after it, and prints the config of the run."),
}


def read_overrides(words: list[str]) -> list[str]:
    """Overrides as Hydra wants them, in order: KEY=VALUE, SECTION={KEY: VALUE}, +variant=NAME, and files of YAML.

    Raises `ConfigError` for anything else, with what is nearest or what to do.
    """
    texts = [text for word in words for text in _from_file(word)]
    return [text for override in _parse(texts) for text in _checked(override)]


def without_print(words: list[str]) -> list[str]:
    """The words without `--cfg job`, by which Hydra's users have a config printed."""
    at = next((place for place, word in enumerate(words) if words[place : place + 2] == ["--cfg", "job"]), None)
    return words if at is None else words[:at] + words[at + 2 :]


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(
                _OPTIONS.get(text.partition("=")[0], f"{text} is no option; a run takes plain KEY=VALUE.")
            )
        try:
            parsed += OverridesParser.create().parse_overrides([_quoted_path(text)])
        except HydraException:
            raise ConfigError(
                f"'{' '.join(text.split())}' is not KEY=VALUE or +variant=NAME; quote values with special characters."
            ) from None
    return parsed


def _quoted_path(text: str) -> str:
    """Paths as they are written: a `~` or a bracket in one is no grammar of Hydra's."""
    key, equals, value = text.partition("=")
    if key not in PATHS or not value or value[0] in "'\"" or value == "null":
        return text
    return f"{key}{equals}{_written(value)}"


def _written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\") if value.endswith("\\") else value
        return "'" + escaped.replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_file(text: str) -> list[str]:
    """The overrides that a YAML file stands for; any other text stands for itself."""
    if "=" in text or not text.endswith((".yaml", ".yml")):
        return [text]
    try:
        found = OmegaConf.to_container(OmegaConf.load(Path(text).expanduser()))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{text} cannot be read as YAML ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{text} holds no keys; write sections, as in 'train: {{steps: 3}}'.")
    return [f"{key}={_written(value)}" for key, value in _leaves_of(found)]


def _leaves_of(section: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _checked(override: Override) -> list[str]:
    """The override as Hydra wants it, key by key, after keys and group choice were found to exist."""
    key, text = override.key_or_group, override.input_line or ""
    if override.is_delete() or override.is_sweep_override():
        raise ConfigError(f"'{text}' deletes or sweeps; a run takes plain KEY=VALUE.")
    if key in GROUPS:
        names = sorted(path.stem for path in (CONFIG_FOLDER / key).glob("*.yaml"))
        if str(override.value()) not in names:
            near = nearest(str(override.value()), names)
            raise ConfigError(f"{key}={override.value()} does not exist; nearest: {near} (all: {', '.join(names)}).")
        return [f"+{key}={override.value()}"]
    keys = dict(leaves(Config))
    if key.rpartition(".")[0] in MAPPINGS:
        return [f"++{text.lstrip('+')}"]
    if key in MAPPINGS or any(name.startswith(f"{key}.") for name in keys):
        value = override.value()
        if not isinstance(value, dict):
            example = f"{key}.{MAPPINGS[key]}" if key in MAPPINGS else next(n for n in keys if n.startswith(f"{key}."))
            raise ConfigError(f"{key} is a section, not a key; set its keys, as in {example}=....")
        inner = [f"{name}={_written(item)}" for name, item in _leaves_of(value, f"{key}.")]
        return [text for each in _parse(inner) for text in _checked(each)]
    if key in ("experiment", "hydra") or key.startswith("hydra."):
        raise ConfigError(
            f"{key} is no config group; groups: {', '.join(GROUPS)}. Keys of your own go into a file that is given by "
            "its name, as in: train/main.py mine.yaml."
        )
    if key not in keys:
        raise ConfigError(f"{key} is no config key; nearest: {max(keys, key=lambda k: _likeness(key, k))}.")
    return [text.lstrip("+")]


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
