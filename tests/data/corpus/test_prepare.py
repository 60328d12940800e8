"""Corpora are made once, whole, and under a name of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.corpus.prepare import made_once
from data.corpus.shards import Shard, ShardError
from data.corpus.sources import SourceError
from tests.harness.corpus_files import texts


def test_a_corpus_is_prepared_once_and_damage_is_found(tmp_path: Path) -> None:
    first = texts(tmp_path)
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    again = texts(tmp_path, tmp_path / "corpus.jsonl")
    assert again.folder == first.folder and (again.folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert texts(tmp_path, tmp_path / "corpus.jsonl", 410).folder != first.folder
    assert not list(first.folder.parent.glob(".making-*")) and not (first.folder / "details.jsonl").exists()
    (first.folder / "tokens.bin").write_bytes((first.folder / "tokens.bin").read_bytes()[:-6])
    with pytest.raises(ShardError, match="delete the folder"):
        Shard(first.folder)


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(SourceError, match=r"empty\.txt leaves nothing to train on .*at least one document"):
        texts(tmp_path, tmp_path / "empty.txt")
    assert not list((tmp_path / "cache" / "corpora").iterdir())


def test_the_first_of_two_makers_wins(tmp_path: Path) -> None:
    def make_fast(aside: Path) -> None:
        (aside / "by").write_text("first")

    def make_slowly(aside: Path) -> None:
        made_once(tmp_path / "made", make_fast)
        (aside / "by").write_text("second")

    made_once(tmp_path / "made", make_slowly)
    assert (tmp_path / "made" / "by").read_text() == "first" and len(list(tmp_path.iterdir())) == 1
