"""Steps of the library's pipelines that read our containers, write our shards and count what goes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import simplify_text

from data.clean.folder import Folder, Plan
from data.clean.settings import Cleaning
from data.clean.tally import Tally, write_report
from data.containers.records import holds_records
from data.corpus.reading import Reading
from data.corpus.sources import read_texts

SHARD = "{:05d}.jsonl.zst"


class Texts(PipelineStep):
    """Documents of a task's files, whatever contains them, each whole; blank ones go."""

    type = "READER"
    name = "texts"

    def __init__(self, plan: Plan, on_bad: str, tally: Tally) -> None:
        super().__init__()
        self.plan, self.on_bad, self.tally = plan, on_bad, tally

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents in order. Raises `SourceError` with all that cannot be read, unless it may be skipped."""
        files = [Path(name) for name in self.plan.tasks[rank]]
        reading = Reading(files, self.on_bad)
        for path in files:
            parts, number = list[str](), 0
            for part, ends in read_texts([path], reading):
                parts.append(part)
                if not ends:
                    continue
                text, number = "".join(parts), number + 1
                parts.clear()
                name = f"{path}: document {number}" if holds_records(path) else str(path)
                self.tally.read(text)
                if text.strip():
                    yield Document(text, name, metadata={"task": rank})
                else:
                    self.tally.drop("texts", "blank", name, text)
        reading.finish()
        self.tally.bad, self.tally.keys = reading.counts.bad, reading.counts.keys


class Kept(PipelineStep):
    """Documents of the shard that a task of an earlier stage wrote."""

    type = "READER"
    name = "kept"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents in order; none where the task had none left."""
        path = self.folder / SHARD.format(rank)
        if not path.is_file():
            return
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                found = json.loads(line)
                yield Document(found["text"], found["from"], metadata={"task": rank})


class Shards(PipelineStep):
    """Every document that comes by as a line of a shard, which is there once all are written."""

    type = "WRITER"
    name = "shards"

    def __init__(self, folder: Path, tally: Tally, kept_in: Path, with_origin: bool = False) -> None:
        super().__init__()
        self.folder, self.tally, self.kept_in, self.with_origin = folder, tally, kept_in, with_origin

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents as they came; a task that has none writes no shard."""
        path = self.folder / SHARD.format(rank)
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        with zstandard.open(aside, "wt", encoding="utf-8", newline="\n") as file:
            for document in data:
                self._line(file, document)
                self.tally.write(document.text)
                yield document
        if self.tally.documents_out:
            aside.rename(path)
        else:
            aside.unlink()
        self.tally.save(self.kept_in / f"{rank:05d}.json")

    def _line(self, file: TextIO, document: Document) -> None:
        origin = {"from": document.id} if self.with_origin else {}
        file.write(json.dumps({"text": document.text, **origin}, ensure_ascii=False) + "\n")


class Counted:
    """What a filter hands the documents to that it drops: they are counted, with their reason, and not written."""

    def __init__(self, by: str, tally: Tally, reason: str = "dropped") -> None:
        self.by, self.tally, self.reason = by, tally, reason

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        """Count a document."""
        reason = document.metadata.get("filter_reason", self.reason)
        self.tally.drop(self.by, reason, document.id, document.text)


class Signatures(MinhashDedupSignature):
    """Signatures as the library makes them; a document of fewer words than a run has is one run."""

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashes of a document's runs of words, one below the other."""
        found: np.ndarray = super().get_shingles(text)
        if found.size:
            return found
        whole = simplify_text(text, self.config.norm_config) or text
        return np.array([[create_hash_func(self.config.hash_config)(whole)]], np.uint64)


class FirstOfEach(PipelineStep):
    """All documents but the first of each cluster of pairs go; the library's own step keeps any of them."""

    type = "DEDUP"
    name = "first of each"

    def __init__(self, pairs: Path, out: Path) -> None:
        super().__init__()
        self.pairs, self.out = pairs, out

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write for each task the numbers of the documents that go, as the library's filter reads them."""
        parents = dict[int, int]()
        for path in sorted(self.pairs.glob("*.dups")):
            quadruples = np.fromfile(path, "<u4").reshape(-1, 4).astype(np.int64)
            ends = quadruples[:, ::2] << 32 | quadruples[:, 1::2]
            for one, other in ends.tolist():
                first, later = sorted((_root(parents, one), _root(parents, other)))
                parents[later] = first
        removed: dict[int, list[int]] = {}
        for node in sorted(parents):
            if _root(parents, node) != node:
                removed.setdefault(node >> 32, []).append(node & 0xFFFFFFFF)
        self.out.mkdir(parents=True, exist_ok=True)
        for task, numbers in removed.items():
            (self.out / f"{task:06d}.remove").write_bytes(struct.pack(f"<{len(numbers)}I", *numbers))


def _root(parents: dict[int, int], node: int) -> int:
    while (parent := parents.setdefault(node, node)) != node:
        parents[node] = node = parents[parent]
    return node


class Report(PipelineStep):
    """The last step of all: the report, after which nothing of the work is needed."""

    type = "REPORT"
    name = "report"

    def __init__(self, asked: Cleaning, folder: Folder, stages: list[str], passed_over: dict[str, int]) -> None:
        super().__init__()
        self.asked, self.folder, self.stages, self.passed_over = asked, folder, stages, passed_over

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the report and clear the work away."""
        write_report(self.asked, self.folder, self.stages, self.passed_over)
        shutil.rmtree(self.folder.work, ignore_errors=True)
