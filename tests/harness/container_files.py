"""Files of records in every container, and what a source of them gives."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.chat.documents import ChatFormat
from data.corpus.prepare import Corpus, Policy, prepare
from data.corpus.reading import Reading, SourceError
from data.corpus.sources import read_texts, source_files
from data.corpus.text import TextFormat
from tests.harness.chat_files import LENGTH, TEXT_ONLY, TOKENIZER

FIX = ". Mend or drop it, or set data.on_bad=skip."
FEW = [{"text": f"text {i} of {random.Random(i).random()}"} for i in range(6000)]
TURNS = '{"role": "user", "content": "What is it?"}', '{"role": "assistant", "content": "A cat."}'


def lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def zstd(whole: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(whole)
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


def prepared(source: Path, kind: str, on_bad: str = "refuse") -> Corpus:
    tokenizer, cache = source.parent / "pieces" / "tokenizer.json", source.parent / "cache"
    tokenizer.parent.mkdir(exist_ok=True)
    TOKENIZER.save(str(tokenizer))
    format = TextFormat(tokenizer) if kind == "text" else ChatFormat(tokenizer, TEXT_ONLY, LENGTH)
    return prepare(str(source), format, cache, Policy(on_bad))


def texts_of(source: Path) -> tuple[list[str], str]:
    """Texts of a file, and what is said of it, without its folder."""
    reading = Reading(source_files(str(source)).files)
    texts = [text for text, _ in read_texts(reading.files, reading)]
    try:
        reading.finish()
    except SourceError as error:
        return texts, str(error).replace(f"{source.parent}/", "").removesuffix(FIX)
    return texts, ""
