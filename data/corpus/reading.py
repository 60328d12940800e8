"""How the files of a source are read: how far, what was wrong with them, and when to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.counts import Counts
from data.corpus.progress import Progress
from data.workers import in_worker
from model.errors import UserError

log = logging.getLogger("gemwright")

ON_BAD = ("refuse", "skip")
_SHOWN = 10
"""Bad lines and files that are named one by one."""


class SourceError(UserError):
    """A source that cannot be read."""


def unreadable(path: object, why: str | None) -> SourceError:
    """The error for a file or folder that the system does not let this user read."""
    return SourceError(f"{path} cannot be read ({why}); give rights to it, or move it away.")


def go_on() -> None:
    """Nothing asks to stop."""


class Span(NamedTuple):
    """Bytes [start, stop) of a file of lines, which begin and end with a line, and the number of the first."""

    start: int
    stop: int
    line: int


@dataclass
class Reading:
    """One pass over the files of a source.

    on_bad: refuse (the source, with all that is bad in it) or skip; check_stop: raises `UserError` when told to stop.
    """

    files: list[Path]
    on_bad: str = "refuse"
    check_stop: Callable[[], None] = go_on
    counts: Counts = field(default_factory=Counts)
    media: set[Path] = field(default_factory=set)
    """Files that lines name."""
    corpus: Path | None = None
    """Folder of the corpus that is made of them, if one is."""

    first: int = 0
    """The number of the first of these files among all of the source."""
    span: Span | None = None
    """What is read of the file, if it is a single one of lines that is not read whole."""
    workers: int = 1
    """Processes that may parse what is read here."""
    progress: Progress | None = None
    """How far it is, if others are to know."""

    def __post_init__(self) -> None:
        self._bad: list[str] = []

    def advance(self, size: int) -> None:
        """Count bytes that were read, and say from time to time how far that is."""
        self.check_stop()
        if self.progress is not None:
            self.progress.add(size)
            if not in_worker():
                self.progress.tell()

    def bad(self, problem: str) -> None:
        """Note a line or file that cannot be read; `problem` begins with its place."""
        self.counts.bad += 1
        if len(self._bad) < _SHOWN:
            self._bad.append(problem.rstrip("."))

    def add(self, part: Reading) -> None:
        """Count and note what was found in a part that was read apart, perhaps in another process."""
        self.counts.add(part.counts)
        self.media |= part.media
        self._bad = (self._bad + part._bad)[:_SHOWN]

    def found(self) -> dict[str, Any]:
        """What was found, as JSON can hold it."""
        return {"counts": asdict(self.counts), "bad": self._bad, "media": sorted(map(str, self.media))}

    def add_found(self, found: dict[str, Any]) -> None:
        """Count and note what `found` told of a part. Raises `ValueError` for counts that are none."""
        part = Reading([], counts=Counts.read(found["counts"]), media={*map(Path, found["media"])})
        part._bad = [str(problem) for problem in found["bad"]]
        self.add(part)

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """A mistake inside is noted as bad, with what it says, and ends what is inside."""
        try:
            yield
        except UserError as error:
            self.bad(str(error))

    def finish(self) -> None:
        """Raises `SourceError` with all that was bad, unless it may be skipped: then it is a warning."""
        if not self._bad:
            return
        more = self.counts.bad - len(self._bad)
        said = listed(self._bad) + (f"; and {more:,} more" if more else "")
        if self.on_bad == "refuse":
            raise SourceError(
                f"{said}. Mend or drop {'it' if self.counts.bad == 1 else 'them'}, or set data.on_bad=skip."
            )
        log.warning("left out as data.on_bad=skip allows: %s", said)


def listed(problems: Iterable[str]) -> str:
    """Problems as one line."""
    return "; ".join(" ".join(problem.split()) for problem in problems)
