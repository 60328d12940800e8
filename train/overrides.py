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

from model import ConfigError
from train.config import Config
from train.groups import OWN, Groups

PATHS = ("run.dir", "run.resume", "model.weights", "data.source", "data.tokenizer", "data.cache")
"""Keys whose values are paths: taken as they are written, a leading `~` is the home folder."""
MAPPINGS = {"data.columns": "output"}
"""Sections in which the keys are a user's, each with an example."""
_FILES = "keys of your own go into a file, as in: train/main.py --config mine.yaml train.steps=3."
_OPTIONS = {
    **dict.fromkeys(
        ("--config-path", "-cp"),
        "there is one config folder; one of your own beside it is named by --config-dir FOLDER.",
    ),
    **dict.fromkeys(("--config-name", "-cn"), f"there is no config to name; {_FILES}"),
    **dict.fromkeys(("-m", "--multirun"), "it starts the runs of a sweep, and goes with train alone, without --cfg."),
    **dict.fromkeys(("--cfg", "-c"), "it takes the word job after it, and prints the config of the run."),
}


def read_overrides(words: list[str]) -> list[str]:
    """Overrides as Hydra wants them: groups of `--config-dir`, choices, then keys, of which the last of a name counts.

    words: KEY=VALUE, SECTION={KEY: VALUE}, +GROUP=NAME, files of YAML, and before all others those of `--config`.
    Raises `ConfigError` for anything else, with what is nearest or what to do.
    """
    files, words = take(words, "--config")
    folders, words = take(words, "--config-dir", "-cd")
    paths = [Path(folder).expanduser().absolute() for folder in folders]
    groups = Groups(paths)
    texts = [text for file in files for text in _from_file(file)]
    texts += [text for word in words for text in (_from_file(word) if is_file(word) else [word])]
    choices, keys = {}, []
    for override in _parse(texts):
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}' deletes or sweeps; a run takes plain KEY=VALUE, and -m sweeps.")
        if _is_choice(override, groups):
            choices[override.key_or_group] = groups.choice(override.key_or_group, str(override.value()))
        else:
            keys += _checked(override, groups)
    where = [f"hydra.searchpath={_written([f'file://{path}' for path in paths])}"] if paths else []
    return [*where, *choices.values(), *keys]


def take(words: list[str], *names: str) -> tuple[list[str], list[str]]:
    """What follows an option by one of these names, as the next word or behind `=`, and the words without it.

    Raises `ConfigError` where nothing follows.
    """
    found, others, left = [], [], iter(words)
    for word in left:
        name, _, value = word.partition("=")
        if name not in names:
            others.append(word)
            continue
        value = value or next(left, "")
        if not value or value.startswith("-"):
            raise ConfigError(f"{name} takes a path after it, as in: train/main.py {name} mine ....")
        found.append(value)
    return found, others


def without_print(words: list[str]) -> list[str]:
    """The words without `--cfg job`, by which Hydra's users have a config printed."""
    at = next((place for place, word in enumerate(words) if words[place : place + 2] == ["--cfg", "job"]), None)
    return words if at is None else words[:at] + words[at + 2 :]


def is_file(word: str) -> bool:
    """Whether a word is the name of a file of keys."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


def parse(text: str) -> Override:
    """A word in Hydra's grammar. Raises `ConfigError`."""
    if text.startswith("-"):
        name = text.partition("=")[0]
        raise ConfigError(
            f"{name}: {_OPTIONS[name]}" if name in _OPTIONS else f"{text} is no option; a run takes plain KEY=VALUE."
        )
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(
            f"'{' '.join(text.split())}' is not KEY=VALUE or +variant=NAME; quote values with special characters."
        ) from None


def _parse(texts: list[str]) -> list[Override]:
    return [parse(_quoted_path(text)) for text in texts]


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


def _from_file(name: str) -> list[str]:
    """The overrides that a YAML file stands for: the groups that its defaults choose, then its keys."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(Path(name).expanduser()))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{name} cannot be read as YAML ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} holds no keys; write sections, as in 'train: {{steps: 3}}'.")
    chosen = _defaults(name, found.pop("defaults", []))
    return chosen + [f"{key}={_written(value)}" for key, value in _leaves_of(found)]


def _defaults(name: str, entries: Any) -> list[str]:
    """Choices of groups, from a file's defaults list."""
    chosen = []
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case "_self_":
                continue
            case dict() if len(entry) == 1 and all(isinstance(text, str) for text in [*entry, *entry.values()]):
                [(group, choice)] = entry.items()
                chosen.append(f"{group.removeprefix('override ').strip('/ ')}={choice}")
            case _:
                raise ConfigError(
                    f"{name}: defaults has {entry}; write a list of GROUP: NAME, as in '- variant: e4b_it'."
                )
    return chosen


def _leaves_of(section: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_choice(override: Override, groups: Groups) -> bool:
    """Whether an override chooses from a group, which may have the name of a section."""
    key = override.key_or_group
    is_section = any(name.startswith(f"{key}.") for name, _ in leaves(Config))
    if key not in groups or (is_section and not isinstance(override.value(), str)):
        return False
    if override.package is not None:
        raise ConfigError(f"'{override.input_line}' names a package; a choice is {key}=NAME.")
    return True


def _checked(override: Override, groups: Groups) -> list[str]:
    """The override as Hydra wants it, key by key, after its keys were found to exist."""
    key, text = override.key_or_group, override.input_line or ""
    keys = dict(leaves(Config))
    if key.rpartition(".")[0] in MAPPINGS:
        return [f"++{text.lstrip('+')}"]
    if key in MAPPINGS or any(name.startswith(f"{key}.") for name in keys):
        value = override.value()
        if not isinstance(value, dict):
            example = f"{key}.{MAPPINGS[key]}" if key in MAPPINGS else next(n for n in keys if n.startswith(f"{key}."))
            raise ConfigError(f"{key} is a section, not a key; set its keys, as in {example}=....")
        inner = [f"{name}={_written(item)}" for name, item in _leaves_of(value, f"{key}.")]
        return [text for each in _parse(inner) for text in _checked(each, groups)]
    if key not in keys:
        raise ConfigError(_unknown(key, groups))
    return [text.lstrip("+")]


def _unknown(key: str, groups: Groups) -> str:
    if key == OWN or key.partition(".")[0] == "hydra":
        return (
            f"{key} is no config group; groups: {groups}. One of your own is a folder in that of --config-dir, as "
            f"{OWN}/mine.yaml in: train/main.py --config-dir FOLDER +{OWN}=mine."
        )
    if "." not in key and (near := groups.like(key)):
        return f"{key} is no config group; nearest: {near} (all: {groups})."
    return f"{key} is no config key; nearest: {nearest_key(key)}."


def nearest_key(wrong: str) -> str:
    """The key that a mistyped one means."""
    return max(dict(leaves(Config)), key=lambda key: _likeness(wrong, key))


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
