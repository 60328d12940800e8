"""Columns of Arrow and Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.containers.records import read_records
from data.corpus.reading import Reading, SourceError
from tests.harness.container_files import (
    FEW,
    TURNS,
    texts_of,
    write_file,
    write_parquet,
    write_stream,
)


def test_columns_of_arrow_are_read_or_refused_with_the_place(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, write in (("a.parquet", write_parquet), ("a.arrow", write_stream), ("a.feather", write_file)):
        write(tmp_path / name, FEW)
        whole = (tmp_path / name).read_bytes()
        assert texts_of(tmp_path / name) == ([record["text"] for record in FEW], "")
        (tmp_path / name).write_bytes(whole[: len(whole) * 4 // 5])
        texts, said = texts_of(tmp_path / name)
        assert said.startswith(f"{name}: row {len(texts) + 1} cannot be read (") and "\n" not in said
        assert len(texts) == (4800 if name == "a.arrow" else 0), "only a stream has its rows before its end"
    (tmp_path / "a.parquet").write_bytes(b"")
    assert texts_of(tmp_path / "a.parquet") == ([], "")
    write_parquet(tmp_path / "a.parquet", [{"id": 1, "body": "a"}])
    assert texts_of(tmp_path / "a.parquet") == ([], "a.parquet has no column \"text\" among 'id', 'body'")
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}, {"text": "b"}])
    assert texts_of(tmp_path / "a.parquet") == (["a", "b"], 'a.parquet: row 2 has no "text" string')
    latin = arrow.StringArray.from_buffers(
        2, arrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), arrow.py_buffer(b"a\xff")
    )
    parquet.write_table(arrow.table({"text": latin}), tmp_path / "a.parquet")
    texts, said = texts_of(tmp_path / "a.parquet")
    assert texts == ["a"] and said.startswith("a.parquet: row 2 cannot be read ('utf-8' codec can't decode byte 0xff")


CALL = '{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": null}}}]}'


def test_columns_that_hold_json_are_read_as_it_says(tmp_path: Path) -> None:
    """So does `datasets` write messages whose contents are of several types."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = arrow.ExtensionArray.from_storage(arrow.json_(), arrow.array([*TURNS, TURNS[0], CALL, "{"]))
    table = arrow.table({"messages": arrow.ListArray.from_arrays([0, 2, 4, 5], texts), "id": [1, None, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    reading, where = Reading([tmp_path / "a.parquet"]), f"{tmp_path / 'a.parquet'}: row "
    first, second = read_records(tmp_path / "a.parquet", reading)
    assert first == (where + "1", {"messages": [json.loads(turn) for turn in TURNS], "id": 1})
    assert second == (where + "2", {"messages": [json.loads(turn) for turn in (TURNS[0], CALL)]})
    with pytest.raises(SourceError, match=r"a\.parquet: row 3 cannot be read \(Expecting property name"):
        reading.finish()


def test_nulls_of_objects_are_keys_that_are_not_there(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    inner = arrow.struct({"b": arrow.int64(), "c": arrow.list_(arrow.int64())})
    kind = arrow.struct({"a": inner, "m": arrow.map_(arrow.utf8(), arrow.int64())})
    cells = [{"a": {"b": None, "c": [1, None]}, "m": [("x", 1), ("y", None)]}, {"a": None, "m": []}, None]
    parquet.write_table(arrow.table({"row": arrow.array(cells, kind)}), tmp_path / "a.parquet")
    found = [value for _, value in read_records(tmp_path / "a.parquet", Reading([]))]
    assert found == [{"row": {"a": {"c": [1, None]}, "m": {"x": 1}}}, {"row": {"m": {}}}, {}]
