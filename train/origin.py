"""What a run keeps of the weights it began with, so that their folder may go away and an export is like it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data.corpus.making import made_once
from model import UserError
from train.manifest import checksum

KEPT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Origin:
    """What a run remembers of the checkpoint it began with: its small files, and each tensor's dtype on disk."""

    folder: Path

    @classmethod
    def remember(cls, folder: Path, source: Path, dtypes: dict[str, torch.dtype]) -> None:
        """Copy what an export needs, so that the source may go away."""

        def copy(aside: Path) -> None:
            for name in KEPT_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, aside / name)
            named = {key: str(dtype).removeprefix("torch.") for key, dtype in dtypes.items()}
            (aside / "dtypes.json").write_text(json.dumps(named, indent=0))

        if cls(folder).digest and not (folder / "dtypes.json").is_file():
            shutil.rmtree(folder)  # half copied, by an earlier version
        made_once(folder, copy)

    @classmethod
    def inherit(cls, folder: Path, checkpoint: Path) -> None:
        """A run that branches off another's checkpoint began where that one did."""
        theirs = checkpoint.resolve().parent.parent / "origin"

        def copy(aside: Path) -> None:
            shutil.copytree(theirs, aside, dirs_exist_ok=True)

        if theirs.is_dir():
            made_once(folder, copy)

    @property
    def digest(self) -> str:
        """Names the files by their contents; empty if there are none."""
        if not self.folder.is_dir():
            return ""
        files = [[path.name, checksum(path)] for path in sorted(self.folder.iterdir()) if path.is_file()]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else ""

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the checkpoint that the run began with."""
        return read_json(self.folder / "config.json")

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Keyed by our names."""
        return {name: DTYPES[kind] for name, kind in read_json(self.folder / "dtypes.json").items()}


def check_origin(state: dict[str, Any], folder: Path, dtype: str) -> None:
    """Raises `UserError` where the small files of the weights that a run began with are not in `folder` any more.

    Without them tensors would get another dtype, and the folder another processor and chat template, unasked.
    """
    expected = state.get("origin")
    if expected and dtype == "auto" and Origin(folder).digest != expected:
        raise UserError(
            f"{folder} lacks what the run kept of the weights it began with (config, processor, template, dtypes), or "
            "that changed; copy it there from the run's own folder, or set the dtype to export without it."
        )


def learned_turns(config: dict[str, Any]) -> bool:
    """Whether a run with this config learned from conversations, so that a turn's end is an end of text."""
    data = config.get("data", {})
    formats = [source.get("format") or data.get("format") for source in data.get("sources", ())]
    return "chat" in (formats or [data.get("format")])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is none. Raises `OSError` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise OSError(f"{path} holds no object")
    return found
