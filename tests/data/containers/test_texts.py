"""Items of JSON and rows of tables of text: what is read, and what is refused with its place."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import data.containers.json_texts
import data.containers.opened
import data.workers
from data.corpus.reading import SourceError
from tests.harness.container_files import (
    TURNS,
    prepared,
    texts_of,
)

A, B, UTF8 = b'{"text": "a"}', b'{"text": "b"}', "item 1 is no UTF-8 (invalid {} byte at byte {} of the file)"
DEEP, DIGITS = b"[" * 100_000, b'{"text": "a", "n": ' + b"9" * 5000 + b"}"


@pytest.mark.parametrize(
    ("name", "whole", "texts", "said"),
    [
        ("a.json", b"", "", ""),
        ("a.json", b" \n", "", ""),
        ("a.json", b"[ ]", "", ""),
        ("a.json", b"\xef\xbb\xbf[" + A + b"\n,\t" + B + b"]\n", "ab", ""),
        ("a.json", A + b"\n\n" + B, "ab", ""),
        ("a.json", b"[" + A + b", " + B[:-2], "a", "item 2 is not JSON (the file ends early)"),
        ("a.json", b"[" + A + b",", "a", "item 2 is not JSON (the file ends early)"),
        ("a.json", b"[" + A, "a", "item 2 is not JSON (the file ends early)"),
        ("a.json", b"[" + A + b",]", "a", "item 2 is not JSON (Expecting value at character 1)"),
        ("a.json", b"[" + A + B + b"]", "a", "item 2 is not JSON (no comma stands before it)"),
        (
            "a.json",
            b"[" + A + b', {"text": tru}, ' + B + b"]",
            "a",
            "item 2 is not JSON (Expecting value at character 10)",
        ),
        (
            "a.json",
            b"[" + A + b"]\n[" + B + b"]",
            "a",
            "item 2 stands behind the end of the array; write all records into one",
        ),
        (
            "a.json",
            b"[" + A + b', {"text": 1, "text": 2}, ' + B + b"]",
            "ab",
            "item 2 is not JSON (an object has 'text' twice)",
        ),
        ("a.json", b"[" + A + b", 12]", "a", 'item 2 has no "text" string'),
        (
            "a.json",
            b'{"version": 1, "data": [' + A + b"]}",
            "",
            'item 1 holds its records under "data"; write that list alone into the file',
        ),
        ("a.json", b"[" + A + b', {"text": "caf\xe9s"}]', "", UTF8.format("continuation", 29)),
        ("a.json", "[]".encode("utf-16"), "", UTF8.format("start", 0)),
        ("a.json", DEEP, "", "item 1 is not JSON that can be read (nested too deep)"),
        ("a.csv", b"", "", ""),
        ("a.csv", b"id,text\n", "", ""),
        ("a.csv", b'\xef\xbb\xbftext\r\na\r\n\r\n"b"\r\n', "ab", ""),
        ("a.csv", b"id,text\n1,a\n2\n3,b\n", "ab", "row 2 has 1 cell where the header has 2"),
        ("a.csv", b"id,text\n1,a\n2,x,y\n3,b\n", "ab", "row 2 has 3 cells where the header has 2"),
        ("a.csv", b"id,text\n1,a\n2,\xe9\n3,b\n", "ab", "row 2 is no UTF-8"),
        ("a.csv", b'id,text\n1,a\n2,"x" y\n3,b\n', "ab", "row 2 is not CSV (',' expected after '\"')"),
        ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', "a", "row 2 is not CSV (unexpected end of data)"),
        ("a.tsv", b'text\tid\na\t1\n"b\n', "a", "row 2 is not CSV (unexpected end of data)"),
    ],
)
def test_json_and_tables_of_text_are_read_or_refused_with_the_place(
    name: str, whole: bytes, texts: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(whole)
    assert texts_of(tmp_path / name) == ([*texts], f"{name}: {said}" if said else "")


@pytest.mark.parametrize(
    ("name", "whole", "said"),
    [
        ("a.csv", b"id;text\n1;a\n", "has no column \"text\" among 'id;text'"),
        ("a.csv", b"text,text\na,b\n", "has the column 'text' twice"),
        ("a.csv", "text\na\n".encode("utf-16"), "has a header that is no UTF-8"),
        ("a.csv", b'"text\na\n', "has a header that is not CSV (unexpected end of data)"),
    ],
)
def test_a_header_that_fits_no_text_is_refused_once(name: str, whole: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(whole)
    assert texts_of(tmp_path / name) == ([], f"{name} {said}")


def test_numbers_of_too_many_digits_end_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[" + DIGITS + b"," + A + b"]")
    texts, said = texts_of(tmp_path / "a.json")
    assert texts == ["a"] and said.startswith("a.json: item 1 is not JSON (Exceeds the limit (4300 digits)")


def test_items_without_an_end_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.containers.json_texts, "_BLOCK", 100)
    monkeypatch.setattr(data.containers.json_texts, "_LONGEST", 1000)
    (tmp_path / "a.json").write_bytes(b"[" + A + b', {"text": "' + b"x" * 5000 + b'"}]')
    said = "a.json: item 2 has over 1,000 characters; write the records into an array, or one a line"
    assert texts_of(tmp_path / "a.json") == (["a"], said)


def test_conversations_in_a_table_of_text_are_json(tmp_path: Path) -> None:
    cells = ["[" + ",".join(TURNS) + "]", "[" + TURNS[0] + "]", "[" + TURNS[0], "Hello", ""]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "images", "tools"], *([cell, "", ""] for cell in cells)])
    with pytest.raises(SourceError) as caught:
        prepared(tmp_path / "a.csv", "chat")
    said = str(caught.value).replace(f"{tmp_path}/", "").split("; ")
    assert "a.csv: row 3: messages must be a list, or its JSON as text" in said
    assert any(part.startswith('a.csv: row 4 has neither a "messages" list nor a "text" string') for part in said)
    assert any(part.startswith('a.csv: row 5 has neither a "messages" list nor a "text" string') for part in said)
    counts = prepared(tmp_path / "a.csv", "chat", "skip").shard.counts
    assert (counts.kept, counts.unsupervised, counts.bad) == (1, 1, 3) and not counts.ignored()
