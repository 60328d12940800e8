"""The same records in every container are the same corpus."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import data.containers.json_texts
import data.containers.opened
import data.workers
from data.chat.documents import ChatFormat
from data.chat.read import Conversation, read_conversations
from data.corpus.dataset import PackedDataset
from data.corpus.prepare import Corpus, prepare
from data.corpus.reading import SourceError
from data.media.files import digest
from model.media import MediaError
from tests.harness.chat_files import E4B, LENGTH, TOKENIZER, chat, model, text, user, write_media
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


def test_pictures_and_sounds_inside_of_a_table_are_kept_with_the_corpus(tmp_path: Path) -> None:
    write_media(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    parts = {"cat.png": "image", "song.wav": "audio", "wide.png": "image"}

    def record(file: Callable[[str], Any]) -> list[dict[str, Any]]:
        said = [{"type": kind, kind: file(name)} for name, kind in parts.items()]
        return [chat(user(part), model([text(f"A cat, {i}.")])) for i in range(5) for part in said]

    def inside(name: str) -> dict[str, Any]:
        return {"bytes": (tmp_path / name).read_bytes(), "path": name}

    def rows(source: Path) -> tuple[Corpus, list[Any]]:
        format = ChatFormat(tmp_path / "tokenizer.json", E4B, LENGTH)
        corpus = prepare(str(source), format, tmp_path / "cache")
        dataset = PackedDataset(corpus, LENGTH, 0, E4B)
        return corpus, [dataset[i] for i in range(dataset.sequences_per_epoch)]

    (tmp_path / "a.jsonl").write_bytes(lines(record(lambda name: name)))
    write_parquet(tmp_path / "a.parquet", record(inside))
    (_, wanted), (corpus, found) = rows(tmp_path / "a.jsonl"), rows(tmp_path / "a.parquet")
    files = [path for path in (corpus.folder / "media").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == sorted(digest(tmp_path / name) for name in parts)
    assert not corpus.shard.counts.ignored() and len(found) == len(wanted) > 1
    cat = digest(tmp_path / "cat.png")
    first_path = f"corpus:media/{cat[:2]}/{cat}"
    for name in parts:
        (tmp_path / name).unlink()
    for row, other in zip(rows(tmp_path / "a.parquet")[1], wanted, strict=True):
        assert row.tokens_S.tolist() == other.tokens_S.tolist() and row.labels_S.tolist() == other.labels_S.tolist()
        assert all(map(torch.equal, chain(*row.images, row.clips), chain(*other.images, other.clips)))
    first = next(iter(read_conversations([tmp_path / "a.parquet"])))
    assert isinstance(first, Conversation) and first.messages[0]["content"] == [{"type": "image", "path": first_path}]
    files[0].write_bytes(b"changed")
    with pytest.raises(MediaError, match=r"media/.* changed since it was prepared"):
        rows(tmp_path / "a.parquet")
