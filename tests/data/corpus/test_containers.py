"""The same records in every container are the same corpus."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import data.containers.json_texts
import data.containers.opened
import data.workers
from data.corpus.prepare import Corpus
from data.corpus.reading import SourceError
from tests.harness.chat_files import chat, model, user
from tests.harness.container_files import (
    lines,
    prepared,
    write_csv,
    write_file,
    write_parquet,
    write_stream,
    zstd,
)
from tests.harness.corpus_files import ids_of

WORDS = ["a cat,", 'a "bird"', "a song\nand\r\na film", "été 漢字 🎉", "\u2028", " \t blank "]
TEXTS = [{"text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(i % 9 + 1))} for i in range(600)]

SKY = {"name": "sky", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
SEA = {"name": "sea", "parameters": {"type": "object", "properties": {"depth": {"type": "number"}}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


CHATS = [
    chat(user(), model(WORDS[i % len(WORDS)] + "cat"), user(), model("A bird.", reasoning="R" * (i % 3 + 1)))
    if i % 2
    else {
        **chat(
            user(),
            model("", tool_calls=[call("sky", city="Oslo") if i % 4 else call("sea", depth=i, city="Rom")]),
            {"role": "tool", "tool_call_id": "1", "content": "grey"},
            model("Grey."),
        ),
        "tools": [{"type": "function", "function": SKY}, {"type": "function", "function": SEA}],
    }
    for i in range(300)
]


RECORDS_OF: dict[str, list[dict[str, Any]]] = {"text": TEXTS, "chat": CHATS}
POOLED = ("a.json", "a.csv", "a.parquet")
"""Containers whose batches are parsed by other processes."""


WAYS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], object]] = {
    "a.ndjson": lambda path, records: path.write_bytes(lines(records)),
    "a.jsonl.gz": lambda path, records: path.write_bytes(
        gzip.compress(lines(records[:9])) + gzip.compress(lines(records[9:]))
    ),
    "a.jsonl.zst": lambda path, records: path.write_bytes(zstd(lines(records[:9])) + zstd(lines(records[9:]))),
    "a.jsonl.xz": lambda path, records: path.write_bytes(lzma.compress(lines(records)) + b"\0\0\0\0"),
    "a.jsonl.bz2": lambda path, records: path.write_bytes(bz2.compress(lines(records))),
    "a.json": lambda path, records: path.write_text("\ufeff" + json.dumps(records, indent=1), encoding="utf-8"),
    "b.json": lambda path, records: path.write_bytes(lines(records)),
    "a.json.gz": lambda path, records: path.write_bytes(gzip.compress(json.dumps(records).encode())),
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": write_parquet,
    "a.arrow": write_stream,
    "a.feather": write_file,
}


def contents(corpus: Corpus) -> list[tuple[list[int], Any]]:
    documents = map(corpus.shard.document, range(corpus.shard.num_documents))
    return [(ids_of(document), document.supervised) for document in documents]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """What lines of JSON give, by the format."""
    folder = tmp_path_factory.mktemp("lines")
    for kind, records in RECORDS_OF.items():
        (folder / f"{kind}.jsonl").write_bytes(lines(records))
    return {kind: prepared(folder / f"{kind}.jsonl", kind) for kind in RECORDS_OF}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", RECORDS_OF)
def test_the_same_records_are_the_same_tokens_and_masks_in_every_container(
    kind: str, name: str, wanted: dict[str, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.containers.json_texts, "_BLOCK", 1000)
    monkeypatch.setattr(data.containers.opened, "_SIZE", 9000)
    monkeypatch.setattr(data.workers, "processors", lambda: 2 if name in POOLED else 1)
    WAYS[name](tmp_path / name, RECORDS_OF[kind])
    made = prepared(tmp_path / name, kind)
    assert contents(made) == contents(wanted[kind]) and made.shard.counts == wanted[kind].shard.counts
    assert made.shard.num_documents == len(RECORDS_OF[kind]) and not made.shard.counts.ignored()
    assert made.folder.name != wanted[kind].folder.name


def test_what_was_whole_before_the_damage_may_be_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(CHATS))[:-6])
    corpus = prepared(tmp_path / "a.jsonl.gz", "chat", "skip")
    assert (corpus.shard.counts.kept, corpus.shard.counts.bad) == (len(CHATS), 1)
    said = "has 1 bad lines or files, left out when it was prepared; mend or drop them, or set data.on_bad=skip"
    with pytest.raises(SourceError, match=said):
        prepared(tmp_path / "a.jsonl.gz", "chat")
