"""Compressed files, whole and damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from data.corpus.reading import Reading, SourceError
from data.corpus.sources import read_texts
from tests.harness.container_files import (
    FEW,
    lines,
    texts_of,
    zstd,
)


@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz"])
def test_damaged_streams_are_named_with_the_line_that_was_reached(kind: str, tmp_path: Path) -> None:
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "zst": zstd,
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }
    whole, path = packers[kind](lines(FEW)), tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(whole[: len(whole) * 4 // 5])
    texts, said = texts_of(path)
    assert texts == [record["text"] for record in FEW[: len(texts)]]
    assert said == f"a.jsonl.{kind}:{len(texts) + 1} cannot be unpacked (the file ends early)"
    assert 1000 < len(texts) < 6000 or kind == "bz2", "one block of .bz2 holds all"
    place = len(whole) - 8 if kind == "gz" else len(whole) // 2  # other changes in .gz may give other lines first
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    texts, said = texts_of(path)
    assert said.startswith(f"a.jsonl.{kind}:{len(texts) + 1} cannot be unpacked (") and "ends early" not in said
    path.write_bytes(whole + b"damage")
    texts, said = texts_of(path)
    assert len(texts) == 6000 and said.startswith(f"a.jsonl.{kind}:6001 cannot be unpacked (")
    path.rename(tmp_path / f"a.txt.{kind}")
    assert texts_of(tmp_path / f"a.txt.{kind}")[1].startswith(f"a.txt.{kind} cannot be unpacked (")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_package_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"PAR1")
    package = {"a.parquet": "pyarrow", "a.jsonl.zst": "zstandard"}[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match=rf"{name} takes {package} to be read; pip install gemwright\[data\]\.$"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json.gz", "a.csv.gz", "a.jsonl.gz"])
def test_large_files_are_read_in_bounded_memory(name: str, tmp_path: Path) -> None:
    record, count = {"text": "a cat, " * 2000}, 1500
    whole = {
        "a.json.gz": lambda: json.dumps([record] * count).encode(),
        "a.csv.gz": lambda: b"text\n" + b'"%b"\n' % record["text"].encode() * count,
        "a.jsonl.gz": lambda: lines([record]) * count,
    }[name]()
    (tmp_path / name).write_bytes(gzip.compress(whole, 1))
    size = len(whole)
    del whole
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_texts([tmp_path / name], Reading([]))) == count
        assert size > 20e6 and tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()
