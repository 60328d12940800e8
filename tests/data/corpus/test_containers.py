"""The same records in every container are the same corpus; what is wrong with one is a sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import data.containers.json_texts
import data.containers.opened
from data.chat.documents import ChatFormat
from data.containers.records import RECORDS, read_records
from data.corpus.hub import fetched
from data.corpus.prepare import Corpus, Policy, prepare
from data.corpus.reading import Reading, SourceError
from data.corpus.sources import read_texts, source_files
from data.corpus.text import TextFormat
from tests.harness.chat_files import LENGTH, TEXT_ONLY, TOKENIZER, chat, model, user
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


def lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def zstd(whole: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(whole)
    return packed


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writerow(columns)
        for record in records:
            cells = [record.get(column, "") for column in columns]
            table.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])


def write_parquet(path: Path, records: Sequence[dict[str, Any]], **more: Any) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(list(records)), path, **more)


def write_stream(path: Path, records: Sequence[dict[str, Any]]) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist(list(records))
    with arrow.ipc.new_stream(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=100)


def write_file(path: Path, records: Sequence[dict[str, Any]]) -> None:
    feather, arrow = pytest.importorskip("pyarrow.feather"), pytest.importorskip("pyarrow")
    feather.write_feather(arrow.Table.from_pylist(list(records)), str(path), compression="zstd")


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


def prepared(source: Path, kind: str, on_bad: str = "refuse") -> Corpus:
    tokenizer, cache = source.parent / "tokenizer.model.json", source.parent / "cache"
    TOKENIZER.save(str(tokenizer))
    format = TextFormat(tokenizer) if kind == "text" else ChatFormat(tokenizer, TEXT_ONLY, LENGTH)
    return prepare(str(source), format, cache, Policy(on_bad))


def contents(corpus: Corpus) -> list[tuple[list[int], Any]]:
    documents = map(corpus.shard.document, range(corpus.shard.num_documents))
    return [(ids_of(document), document.supervised) for document in documents]


@pytest.mark.parametrize(("kind", "records"), [("text", TEXTS), ("chat", CHATS)])
def test_the_same_records_are_the_same_tokens_and_masks_in_every_container(
    kind: str, records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.containers.json_texts, "_BLOCK", 1000)
    monkeypatch.setattr(data.containers.opened, "_SIZE", 9000)
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    wanted = prepared(tmp_path / "a.jsonl", kind)
    assert wanted.shard.num_documents == len(records) and not wanted.shard.counts.ignored()
    for name, write in WAYS.items():
        write(tmp_path / name, records)
        made = prepared(tmp_path / name, kind)
        assert contents(made) == contents(wanted) and made.shard.counts == wanted.shard.counts, name
    assert len(list((tmp_path / "cache" / "corpora").glob("[!.]*"))) == len(WAYS) + 1
