"""What became of the documents of one task, and of all; files of JSON that say so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.clean.folder import Folder, write_whole
from data.clean.settings import Cleaning
from data.corpus.counts import Counts, add

_SHOWN = 160
"""Characters of an example."""


@dataclass
class Dropped:
    """Documents that went for one reason."""

    documents: int = 0
    bytes: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Tally:
    """Documents and their bytes in UTF-8: read, dropped by filter and reason, and written."""

    examples: int = 3
    documents_in: int = 0
    bytes_in: int = 0
    bad: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """The keys are "filter: reason"."""
    keys: dict[str, int] = field(default_factory=dict)
    """Keys of records besides the text, which are not kept."""
    documents_out: int = 0
    bytes_out: int = 0

    def read(self, text: str) -> None:
        """Count a document that was read."""
        self.documents_in += 1
        self.bytes_in += len(text.encode())

    def drop(self, by: str, reason: str, name: str, text: str) -> None:
        """Count a document that goes, and keep the first few as examples."""
        found = self.dropped.setdefault(f"{by}: {reason}", Dropped())
        found.documents += 1
        found.bytes += len(text.encode())
        if len(found.examples) < self.examples:
            found.examples.append({"document": name, "begins": " ".join(text[: 4 * _SHOWN].split())[:_SHOWN]})

    def write(self, text: str) -> None:
        """Count a document that is written."""
        self.documents_out += 1
        self.bytes_out += len(text.encode())

    def save(self, path: Path) -> None:
        """Keep it for the report."""
        write_whole(path, json.dumps(asdict(self)))

    def add(self, kept: dict[str, Any], is_first: bool, is_last: bool) -> None:
        """Count what a task kept; the first stage has read the source, and the last has written what is left."""
        if is_first:
            self.documents_in += kept["documents_in"]
            self.bytes_in += kept["bytes_in"]
            self.bad += kept["bad"]
            for key, number in kept["keys"].items():
                add(self.keys, [key], number)
        if is_last:
            self.documents_out += kept["documents_out"]
            self.bytes_out += kept["bytes_out"]
        for reason, theirs in kept["dropped"].items():
            ours = self.dropped.setdefault(reason, Dropped())
            ours.documents += theirs["documents"]
            ours.bytes += theirs["bytes"]
            ours.examples = (ours.examples + theirs["examples"])[: self.examples]


def write_report(asked: Cleaning, folder: Folder, stages: list[str], passed_over: dict[str, int]) -> None:
    """Add up what all tasks of these stages kept, in their order, and write the report."""
    total = Tally(asked.examples)
    for stage in stages:
        for path in sorted((folder.logs(stage) / "tally").glob("*.json")):
            total.add(json.loads(path.read_text(encoding="utf-8")), stage == stages[0], stage == stages[-1])
    found = {name: value for name, value in asdict(total).items() if name != "examples"}
    found["dropped"] = dict(sorted(found["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0])))
    gone = sum(dropped["bytes"] for dropped in found["dropped"].values())
    found["bytes_cut"] = total.bytes_in - gone - total.bytes_out
    report = {
        "source": asked.source,
        "filters": asked.filters,
        "dedup": asked.dedup,
        **found,
        "passed_over": passed_over,
    }
    write_whole(folder.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def rows(report: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Rows of a report as a table: what came in, went and is left."""
    yield _row("in", report["documents_in"], report["bytes_in"], report)
    for reason, dropped in report["dropped"].items():
        example = next((f"{found['document']}" for found in dropped["examples"]), "")
        yield _row(reason, dropped["documents"], dropped["bytes"], report) | {"for example": Path(example).name}
    if report["bad"]:
        yield _row("cannot be read", report["bad"], 0, report)
    if report["bytes_cut"]:
        yield _row("cut by c4 from what is left", 0, report["bytes_cut"], report)
    yield _row("out", report["documents_out"], report["bytes_out"], report)


def unread(report: dict[str, Any]) -> str:
    """What of the source is in no document: keys of records, and files passed over; empty if there is nothing."""
    return Counts(keys=report["keys"], files=report["passed_over"]).ignored()


def _row(what: str, documents: int, size: int, report: dict[str, Any]) -> dict[str, str]:
    share = f"{documents / max(report['documents_in'], 1):.1%}"
    return {"what": what, "documents": f"{documents:,}", "share": share, "MB": f"{size / 1e6:,.2f}", "for example": ""}
