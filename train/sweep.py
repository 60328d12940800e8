"""Sweeps: `-m` makes several runs of one command line, one for each combination of the values it lists.

    python train/main.py -m +variant=tiny_e4b optimizer.lr=1e-3,3e-3 'schedule.name=choice(cosine,wsd)'

Each run is a process of its own in a folder of its own, run.dir/NUMBER_CHOICES, so the same command again goes on with
what is unfinished. In an array of SLURM's each task is one of the runs.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from model import ConfigError
from train import records
from train.load_config import load_config, printed
from train.overrides import is_file, parse, without_print

FLAGS = ("-m", "--multirun")
_ARRAY = "SLURM_ARRAY_TASK_ID"


@dataclass(frozen=True)
class Job:
    """One run of a sweep: what it has of the listed values, its words in full, and its folder."""

    choices: tuple[str, ...]
    words: list[str]
    folder: Path


def is_sweep(words: list[str]) -> bool:
    """Whether a command line asks for several runs."""
    return not set(FLAGS).isdisjoint(words)


def jobs(words: list[str]) -> list[Job]:
    """Every combination of the values that the words list, the last word's values changing first, each checked.

    Raises `ConfigError`, before anything is started, where one of them is no run.
    """
    listed = [_values(word) for word in words if word not in FLAGS]
    swept = [place for place, values in enumerate(listed) if len(values) > 1]
    if any(listed[place][0].startswith("run.dir=") for place in swept):
        raise ConfigError("run.dir is one folder, in which each run of a sweep gets its own; give one.")
    found = []
    for number, combination in enumerate(itertools.product(*listed)):
        choices = tuple(combination[place].lstrip("+") for place in swept)
        config = load_config(list(combination))
        folder = Path(config.run.dir) / _name(number, choices)
        found.append(Job(choices, [*combination, f"run.dir={folder}"], folder))
    return found


def words_of_task(words: list[str]) -> list[str]:
    """What a process of torchrun has to run of a sweep: the run of its task in an array of SLURM's.

    Raises `ConfigError` where there is no array, since ranks would sweep each for itself.
    """
    if _ARRAY not in os.environ:
        raise ConfigError(
            "-m under torchrun would have every rank sweep for itself; let each run start its own ranks instead: "
            "gemwright train --nproc 8 -m ... (or python -m launch.command train --nproc 8 -m ...)."
        )
    return _task(jobs(words)).words


def sweep(words: list[str], launcher: list[str]) -> int:
    """Make the runs of a sweep one after the other, and print a table of them; 1 if one failed.

    With `--cfg job` their configs are printed instead. launcher: the command that a run's words follow. Raises
    `ConfigError`.
    """
    found = jobs(without_print(words))
    if without_print(words) != words:
        print("\n".join(f"---\n# {' '.join(job.choices)}\n{printed(load_config(job.words))}" for job in found), end="")
        return 0
    if _ARRAY in os.environ:
        found = [_task(found)]
    codes: list[int] = []
    with _Stop() as stop:
        for number, job in enumerate(found, start=1):
            if stop.number is not None:
                break
            what = " ".join(job.choices) or "nothing is listed"
            print(f"run {number} of {len(found)}: {what} | run folder {job.folder}", flush=True)
            codes.append(stop.wait_for(subprocess.Popen([*launcher, *job.words])))
    print("\n".join(_table(found, codes)), flush=True)
    return 128 + stop.number if stop.number is not None else int(any(codes))


class _Stop:
    """The signal that asked a sweep to stop, handed on to the run that is under way; no other is started then."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Stop:
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for(self, process: subprocess.Popen[bytes]) -> int:
        self._process = process
        return process.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self._process is not None and number != signal.SIGINT:  # a terminal sends that to the run too
            self._process.send_signal(number)


def _values(word: str) -> list[str]:
    """The word once for each value that it lists."""
    if "=" not in word or word.startswith("-") or is_file(word):
        return [word]
    try:
        override = parse(word)
    except ConfigError:
        if "," in word.partition("=")[2]:
            raise
        return [word]  # such as a path, which load_config takes as it is written
    if not override.is_sweep_override():
        return [word]
    if not override.is_discrete_sweep():
        raise ConfigError(f"'{word}' has no end of values; list them, as in KEY=1,2 or KEY=range(1,5).")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _name(number: int, choices: tuple[str, ...]) -> str:
    """A folder's name: the number, and the last part of each key with its value, without what a shell would read."""
    parts = [choice.partition("=") for choice in choices]
    last = [key.rpartition(".")[2] for key, _, _ in parts]
    keys = [name if last.count(name) == 1 else key for name, (key, _, _) in zip(last, parts, strict=True)]
    texts = [f"{key}_{value}" for key, (_, _, value) in zip(keys, parts, strict=True)]
    return re.sub(r"[^\w.+-]+", "-", "_".join([str(number), *texts]))[:120].rstrip("-.")


def _task(found: list[Job]) -> Job:
    """The run of this task of an array."""
    task = int(os.environ[_ARRAY])
    if not 0 <= task < len(found):
        raise ConfigError(f"{_ARRAY}={task}, but the sweep has {len(found)} runs; submit --array=0-{len(found) - 1}.")
    return found[task]


def _table(found: list[Job], codes: list[int]) -> Iterator[str]:
    """A line for each run: its folder's name, what it had, how it ended, and the last loss in its metrics."""
    rows = [(f"in {found[0].folder.parent}", "choices", "exit", "last loss")]
    for job, code in itertools.zip_longest(found, codes):
        losses = records.read(job.folder / "metrics.jsonl", ("step", "loss"))
        end = "not started" if code is None else str(code) if code >= 0 else signal.Signals(-code).name
        rows.append((job.folder.name, " ".join(job.choices), end, f"{losses[-1]['loss']:.4f}" if losses else "none"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
