"""Config groups: the folders of `configs/` and of the user, and numbers in them that depend on the size of a model."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import configs
from model import ConfigError
from model.errors import nearest
from model.variants import VARIANT_NAMES
from train.config import ModelConfig

CONFIG_FOLDER = Path(configs.__file__).parent
OWN = "experiment"
"""The group that is for users alone; configs/config.yaml has a place for it after all others."""


class Groups:
    """The groups that a command line can choose from: those of `configs/`, and those of the user's folders."""

    def __init__(self, folders: list[Path]) -> None:
        """Raises `ConfigError` where a folder is missing, or a file of it would be hidden by one of ours."""
        self._names = _names_of(CONFIG_FOLDER)
        self._placed = {*self._names, OWN}
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError(f"--config-dir {folder} is no folder; name the one that holds {OWN}/mine.yaml.")
            for group, names in _names_of(folder).items():
                known = self._names.setdefault(group, [])
                if double := next((name for name in names if name in known), None):
                    raise ConfigError(
                        f"{folder / group / double}.yaml has the name of another {group}={double}, which is taken in "
                        "its place; rename it."
                    )
                known.extend(names)

    def __contains__(self, group: str) -> bool:
        return group in self._names

    def __str__(self) -> str:
        return ", ".join(sorted(self._names))

    def like(self, word: str) -> str | None:
        """The group that a mistyped word without a section means, if any is near."""
        return next(iter(difflib.get_close_matches(word, self._names, 1, 0.6)), None)

    def choice(self, group: str, name: str) -> str:
        """The choice as Hydra wants it. Raises `ConfigError` with the nearest name."""
        names = sorted(self._names[group])
        if name not in names:
            raise ConfigError(
                f"{group}={name} does not exist; nearest: {nearest(name, names)} (all: {', '.join(names)})."
            )
        return f"{'' if group in self._placed else '+'}{group}='{name}'"


def _names_of(folder: Path) -> dict[str, list[str]]:
    """Groups of a folder, and the names in each."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, []).append(path.stem)
    return found


def register_by_size() -> None:
    """Have `${by_size:{e2b: 4e-4, tiny: 5e-3}, 3e-4}` in a file of a group stand for the number of the run's model."""
    OmegaConf.register_new_resolver("by_size", _by_size, replace=True)


def _by_size(table: DictConfig, otherwise: Any, *, _root_: DictConfig) -> Any:
    """The entry of the model's name, else of its size, else `otherwise`, as for weights whose variant is not named."""
    entries = {str(key): value for key, value in table.items()}
    sizes = {name.removeprefix("gemma4_") for name in VARIANT_NAMES} | {"tiny"}
    if unknown := next((size for size in entries if size not in sizes), None):
        raise ConfigError(f"by_size has no {unknown}; nearest: {nearest(unknown, sizes)}")
    name = str(OmegaConf.select(_root_, "model.name"))
    if name == ModelConfig().name and OmegaConf.select(_root_, "model.weights") is not None:
        return otherwise
    variant = name.removeprefix("gemma4_")
    wanted = (variant, variant.removesuffix("_it"), "tiny" if variant.startswith("tiny_") else "")
    return next((entries[size] for size in wanted if size in entries), otherwise)
