"""What a cleaning is asked for, and what may be asked together."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from data.corpus.reading import ON_BAD
from model.errors import UserError

FILTERS = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
DEDUP = ("exact", "minhash", "none")
EXECUTORS = ("local", "slurm")
MOST_TASKS = 4096
_NO_RESULT = ("out", "workers", "executor", "partition", "time", "memory_gb", "qos")
"""Keys on which no byte of the result depends."""


class CleanError(UserError):
    """A cleaning that cannot be done, or cannot go on."""


@dataclass
class Cleaning:
    """Arguments of `gemwright clean`."""

    source: str
    out: str
    filters: list[str] = field(
        default_factory=lambda: ["gopher_repetition", "gopher_quality"], metadata={"choices": FILTERS}
    )
    """In their order, the first that drops a document is counted."""
    dedup: str = field(default="exact", metadata={"choices": DEDUP})
    """Documents go but for the first that have the same text (exact), or mostly the same runs of words (minhash)."""
    workers: int = 0
    """Tasks at once; 0 is as many as there are processors, and under SLURM no limit."""
    tasks: int = 0
    """Parts that the source's files are dealt to, each with its own shard; 0 is one for each 16 MB, at most 4,096."""
    executor: str = field(default="local", metadata={"choices": EXECUTORS})
    on_bad: str = field(default="refuse", metadata={"choices": ON_BAD})
    """What becomes of files and records that cannot be read: refuse or skip."""
    examples: int = 3
    """Documents of each reason that the report shows."""
    min_words: int = 50
    """Fewest words of a document, by gopher_quality."""
    max_words: int = 100_000
    """Most words of a document, by gopher_quality."""
    stop_words: int = 2
    """English stop words of eight that a document has at least, by gopher_quality; 0 for other languages."""
    min_sentences: int = 5
    """Fewest sentences that c4 leaves of a document."""
    end_punctuation: bool = True
    """Whether c4 drops lines that do not end in punctuation."""
    language: list[str] = field(default_factory=list)
    """Languages that stay, as the model names them; without any, no language is looked at."""
    language_model: str | None = None
    """File of a fastText model that tells languages apart, such as lid.176.bin."""
    language_score: float = 0.65
    """Least probability of a document's language."""
    ngram: int = 5
    """Words of each run that minhash compares."""
    buckets: int = 14
    """Chances of two documents to be found alike by minhash."""
    hashes: int = 8
    """Hashes that must be equal in one of the buckets."""
    same_numbers: bool = False
    """Whether minhash takes all numbers for one, so that tables and logs that differ in them alone are alike."""
    partition: str | None = None
    """Partition of SLURM's jobs, which needs one."""
    time: str = "24:00:00"
    """Longest time of a job of SLURM."""
    memory_gb: int = 4
    """Memory of a job of SLURM."""
    qos: str | None = None
    """Quality of service of SLURM's jobs."""


_BELONGS = {
    "filters=gopher_quality": ("min_words", "max_words", "stop_words"),
    "filters=c4": ("min_sentences", "end_punctuation"),
    "language": ("language_model", "language_score"),
    "dedup=minhash": ("ngram", "buckets", "hashes", "same_numbers"),
    "executor=slurm": ("partition", "time", "memory_gb", "qos"),
}
_LEAST = {
    "workers": 0,
    "tasks": 0,
    "examples": 0,
    "min_words": 1,
    "max_words": 1,
    "stop_words": 0,
    "min_sentences": 1,
    "ngram": 1,
    "buckets": 1,
    "hashes": 1,
    "memory_gb": 1,
}


def check(asked: Cleaning) -> None:
    """Raises `CleanError` for what is out of bounds, would have no effect, or lacks something."""
    for name, least in _LEAST.items():
        if getattr(asked, name) < least:
            raise CleanError(f"{name}={getattr(asked, name)} is below {least}; give {least} or more.")
    if asked.tasks > MOST_TASKS:
        raise CleanError(f"tasks={asked.tasks} is above {MOST_TASKS}; give {MOST_TASKS} or fewer.")
    if asked.max_words < asked.min_words:
        raise CleanError(f"max_words={asked.max_words} is below min_words={asked.min_words}; nothing would be left.")
    twice = next((name for name in asked.filters if asked.filters.count(name) > 1), None)
    if twice:
        raise CleanError(f"filters= has {twice} twice; give it once.")
    if not asked.filters and not asked.language and asked.dedup == "none":
        raise CleanError("filters=[] with dedup=none leaves nothing to do; give a filter, or dedup=exact.")
    for needed, names in _BELONGS.items():
        key, equals, value = needed.partition("=")
        given = getattr(asked, key)
        idle = next((name for name in names if getattr(asked, name) != _default(name)), None)
        if idle and not (value in (given if isinstance(given, list) else [given]) if equals else given):
            raise CleanError(f"{idle}={getattr(asked, idle)} has no effect without {needed}; add that, or drop it.")
    if asked.language and not (asked.language_model and Path(asked.language_model).expanduser().is_file()):
        raise CleanError(
            f"language={asked.language[0]} needs language_model=, the file of a fastText model such as lid.176.bin"
            f"{f'; {asked.language_model} is none' if asked.language_model else ''}."
        )
    if asked.executor == "slurm" and not asked.partition:
        raise CleanError("executor=slurm needs partition=; give one that `sinfo` lists.")


def deciding(asked: Cleaning) -> dict[str, Any]:
    """The keys on which the result depends, but for the source, whose files are compared instead."""
    return {name: value for name, value in vars(asked).items() if name not in (*_NO_RESULT, "source")}


def _default(name: str) -> Any:
    found = next(field for field in fields(Cleaning) if field.name == name)
    return found.default if found.default is not MISSING else None
