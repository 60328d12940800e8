"""Where a run goes on from, and whether what it finds there fits what was asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data.corpus.open import Data
from model import ConfigError
from train.checkpoint import Checkpointer, read_state
from train.config import ScheduleConfig
from train.resolve import Resolved
from train.schedule import learning_rate

log = logging.getLogger("gemwright")

_UNTOLD = (
    "run.dir",
    "run.resume",
    "trackers.",
    "export.",
    "checkpoint.",
    "data.cache",
    "data.workers",
    "train.log_every",
)
"""Keys that change nothing of what a run computes."""


@dataclass(frozen=True)
class Progress:
    """How far a run is; saved beside the tensors, with what the numbers refer to."""

    step: int
    tokens_seen: int
    sequences_seen: int
    """Index of the next sequence: the whole data state, together with `data`."""
    data: dict[str, object]
    model: dict[str, object]
    frozen: list[str] = field(default_factory=list)
    """Modules without optimizer state."""
    config: dict[str, Any] = field(default_factory=dict)
    """All keys of the run that saved it."""
    steps: int = 0
    """Steps of that whole run."""
    since: int = 0
    """The sequence from which the present mixture holds, and below what each source gave before it, by key."""
    used_before: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    """Sequences that each source has given so far."""
    origin: str = ""
    """Digest of the small files of the weights that the run began with; empty for drawn ones."""

    @classmethod
    def fresh(cls, run: Resolved, opened: Data) -> Progress:
        """Nothing done yet, and what the numbers will refer to."""
        tokenizer = hashlib.sha256(opened.tokenizer_file.read_bytes()).hexdigest()
        data = {
            "corpus": opened.name,
            "tokenizer": tokenizer,
            "sequence_length": run.config.data.sequence_length,
            "seed": run.config.run.seed,
        }
        sizes = json.loads(json.dumps(asdict(run.model)))  # as they are read back
        config = asdict(run.config)
        return cls(0, 0, 0, data, sizes, list(run.frozen), config, used=dict.fromkeys(opened.keys, 0))


def find_checkpoint(wanted: str, checkpointer: Checkpointer) -> Path | None:
    """The verified checkpoint that `run.resume` means, or None to start afresh.

    A folder of another run is where this one starts; once it has checkpoints of its own, a
    restart goes on from those. Raises `ConfigError` where going on would bury something.
    """
    own = checkpointer.newest()
    if wanted == "auto":
        return own
    if wanted == "never":
        if own is not None:
            raise ConfigError(
                f"run.resume=never, but {checkpointer.folder.parent} holds checkpoints of another run; "
                "choose another run.dir."
            )
        return None
    folder = Path(wanted)
    if own is None or own.resolve() == folder.resolve():
        return checkpointer.verified(folder)
    if folder.resolve().parent == checkpointer.folder.resolve():
        raise ConfigError(
            f"run.resume={folder} would bury the later {own.name} of the same run; "
            "give another run.dir to branch off from it."
        )
    return own


def saved_progress(checkpoint: Path) -> Progress:
    """What a checkpoint says of the run that saved it. Raises `ConfigError` where it does not say enough."""
    state = read_state(checkpoint)
    needed = [f.name for f in fields(Progress) if f.default is f.default_factory is MISSING]
    missing = [name for name in needed if name not in state]
    if missing:
        raise ConfigError(f"checkpoint {checkpoint} lacks {missing[0]} in its state.json; give another.")
    return Progress(**{f.name: state[f.name] for f in fields(Progress) if f.name in state})


def progress_from(checkpoint: Path, asked: Progress) -> Progress:
    """Progress of a checkpoint, checked against a fresh `Progress` of this run.

    Another model, tokenizer or optimizer raises `ConfigError`; other data starts its own index at 0, and sources that
    are mixed otherwise go on where each was.
    """
    saved = saved_progress(checkpoint)
    for key, value in asked.model.items():
        if key in saved.model and saved.model[key] != value:
            raise ConfigError(
                f"checkpoint {checkpoint} has model.{key}={_short(saved.model[key])}, this run {_short(value)}; "
                "use that value, or choose another run.dir."
            )
    if saved.data["tokenizer"] != asked.data["tokenizer"]:
        raise ConfigError(
            f"checkpoint {checkpoint} was trained with another tokenizer; set data.tokenizer to the tokenizer.json "
            "in its run folder, or choose another run.dir."
        )
    for key, earlier in (("name", "adamw"), ("state_dtype", "float32")):
        before, now = (progress.config.get("optimizer", {}).get(key, earlier) for progress in (saved, asked))
        if before != now:
            raise ConfigError(
                f"checkpoint {checkpoint} has the state of optimizer.{key}={before}, this run is by {now}; use that "
                "value, or export its weights, and begin another run.dir from them by model.weights."
            )
    for names, what in (
        (set(saved.frozen) - set(asked.frozen), "trained from here on, with fresh optimizer state"),
        (set(asked.frozen) - set(saved.frozen), "frozen from here on; their optimizer state is dropped"),
    ):
        if names:
            log.warning("%s: %s", ", ".join(sorted(names)), what)
    asked = replace(asked, step=saved.step, tokens_seen=saved.tokens_seen)
    changed = [key for key, value in asked.data.items() if saved.data[key] != value]
    if not changed:
        since, used = saved.since, saved.used_before
    elif changed == ["corpus"] and (kept := {key: saved.used[key] for key in asked.used if key in saved.used}):
        log.warning("the mixture changed: %d of %d sources go on where they were", len(kept), len(asked.used))
        since, used = saved.sequences_seen, kept
    else:
        log.warning("the data changed (%s): its index starts at 0", ", ".join(changed))
        return asked
    return replace(asked, sequences_seen=saved.sequences_seen, since=since, used_before=used)


def changes(saved: Progress, asked: Progress) -> list[str]:
    """What a run that goes on does otherwise than the one that saved, key by key, and what becomes of its rate.

    Empty for a checkpoint that does not tell its config.
    """
    before, now = dict(_flat(saved.config)), dict(_flat(asked.config))
    found = [
        f"{key} {_told(before[key])} -> {_told(value)}"
        for key, value in now.items()
        if key in before and before[key] != value and not key.startswith(_UNTOLD)
    ]
    if found and saved.step < asked.steps:
        old, new = _rate(saved, saved.step), _rate(asked, saved.step)
        if not math.isclose(old, new, rel_tol=1e-6):
            found.append(f"the next step's rate is {new:.2e}, by the earlier config {old:.2e}")
    return found


def _rate(progress: Progress, step: int) -> float:
    config = progress.config
    known = {f.name for f in fields(ScheduleConfig)}
    schedule = ScheduleConfig(**{key: value for key, value in config["schedule"].items() if key in known})
    return learning_rate(schedule, config["optimizer"]["lr"], min(step, progress.steps - 1), progress.steps)


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _told(value: object) -> str:
    return "unset" if value is None else str(value)


def _short(value: object) -> object:
    """Sizes of an encoder as a word."""
    return "an encoder" if isinstance(value, dict) and len(value) > 1 else "none" if value is None else value
