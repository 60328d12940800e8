"""Groups of files in archives."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.chat.documents import ChatFormat
from data.containers.records import read_records
from data.corpus.prepare import Policy, prepare
from data.corpus.reading import Reading, SourceError
from tests.harness.chat_files import E4B, LENGTH, TOKENIZER, chat, model, text, user, write_media
from tests.harness.container_files import lines, texts_of
from tests.harness.corpus_files import ids_of


def archive(files: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as whole:
        for name, value in files.items():
            contents = value if isinstance(value, bytes) else json.dumps(value).encode()
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            whole.addfile(member, io.BytesIO(contents))
    return out.getvalue()


def test_files_of_a_group_are_those_that_its_record_names(tmp_path: Path) -> None:
    cat, song = {"type": "image", "path": "1.cat.png"}, {"type": "audio", "audio": "a/2.wav"}
    (tmp_path / "a.tar.gz").write_bytes(
        gzip.compress(
            archive(
                {
                    "1.cat.png": b"cat",
                    "1.json": chat(user(cat), model("1.cat.png")),
                    "._1.png": b"hidden",
                    "a/2.json": chat(user(song), id="a/2.wav"),
                    "a/2.wav": b"song",
                    "a/2.txt": b"words",
                    "a/3.json": {"images": ["3.jpg", "b.jpg"], "text": "3.jpg"},
                    "a/3.jpg": b"wide",
                }
            )
        )
    )
    reading = Reading([tmp_path / "a.tar.gz"])
    first, second, third = read_records(tmp_path / "a.tar.gz", reading)
    place = f"{tmp_path / 'a.tar.gz'}: "
    assert first == (
        place + "1",
        chat(user({**cat, "path": {"bytes": b"cat"}}), model("1.cat.png")) | {"messages": first[1]["messages"]},
    )
    assert first[1]["messages"][0]["content"] == [{"type": "image", "path": {"bytes": b"cat"}}]
    assert second[0] == place + "a/2" and second[1]["id"] == "a/2.wav"
    assert second[1]["messages"][0]["content"] == [{"type": "audio", "audio": {"bytes": b"song"}}]
    assert third == (place + "a/3", {"images": [{"bytes": b"wide"}, "b.jpg"], "text": "3.jpg"})
    assert reading.counts.files == {".txt in archives that no record names": 1} and not reading.counts.bad


def test_an_archive_is_the_corpus_of_its_files(tmp_path: Path) -> None:
    write_media(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    names = {"cat.png": "image", "wide.png": "image", "song.wav": "audio"}
    records = [chat(user({"type": kind, "path": name}), model([text("A cat.")])) for name, kind in names.items()]
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    groups = zip(names, records, strict=True)
    files = {
        part: value
        for name, record in groups
        for part, value in ((name, (tmp_path / name).read_bytes()), (name[:-3] + "json", record))
    }
    (tmp_path / "a.tar").write_bytes(archive(files))
    format = ChatFormat(tmp_path / "tokenizer.json", E4B, LENGTH)
    wanted, made = (prepare(str(tmp_path / name), format, tmp_path / "cache") for name in ("a.jsonl", "a.tar"))
    assert made.shard.counts == wanted.shard.counts and made.shard.num_documents == 3
    for i in range(3):
        ours, theirs = made.shard.document(i), wanted.shard.document(i)
        assert ids_of(ours) == ids_of(theirs) and ours.supervised == theirs.supervised
        (kept,), (file,) = ours.media, theirs.media
        assert kept.sha256 == file.sha256 and Path(kept.path) == made.folder / "media" / file.sha256[:2] / file.sha256
        assert Path(kept.path).read_bytes() == Path(file.path).read_bytes()


@pytest.mark.parametrize(
    ("files", "texts", "said"),
    [
        ({}, "", ""),
        ({"1.json": {"text": "a"}, "2.json": {"text": "b"}}, "ab", ""),
        (
            {"1.json": {"text": "a"}, "2.jpg": b"", "2.txt": b""},
            "a",
            ": 2 has 0 .json among .jpg, .txt; write its record into one",
        ),
        ({"1.json": {}, "1.b.json": {}}, "", ": 1 has 2 .json among .json, .b.json; write its record into one"),
        ({"1.json": b"{"}, "", ": 1 is not JSON (Expecting property name enclosed in double quotes at character 2)"),
        ({"1.json": b"\xff"}, "", ": 1 is no UTF-8 (invalid start byte at byte 0)"),
    ],
)
def test_records_of_archives_are_read_or_refused_with_their_name(
    files: dict[str, Any], texts: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(archive(files))
    assert texts_of(tmp_path / "a.tar") == ([*texts], f"a.tar{said}" if said else "")


def test_damaged_archives_are_named_with_the_file_that_was_reached(tmp_path: Path) -> None:
    whole = archive({f"{i}.json": {"text": f"{i}" * 600} for i in range(1, 10)})
    for size, behind in ((3700, 2), (4608, 3), (5000, 3)):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        texts, said = texts_of(tmp_path / "a.tar")
        assert [text[0] for text in texts] == [*"123"][:behind], size
        assert said.startswith(f"a.tar cannot be unpacked behind {behind}.json (") and "end" in said
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole)[:-6])
    texts, said = texts_of(tmp_path / "a.tar.gz")
    assert len(texts) in (8, 9) and said.endswith("json (the file ends early)")
    (tmp_path / "a.tar").write_bytes(b"no archive")
    assert texts_of(tmp_path / "a.tar")[1].startswith("a.tar cannot be unpacked behind its beginning (")


def test_a_picture_of_an_archive_that_cannot_be_read_is_bad(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    image = {"type": "image", "path": "1.png"}
    (tmp_path / "a.tar").write_bytes(archive({"1.png": b"none", "1.json": chat(user(image), model([text("A cat.")]))}))
    format = ChatFormat(tmp_path / "tokenizer.json", E4B, LENGTH)
    with pytest.raises(SourceError, match=r"a\.tar: 1: media/14/140bed\w+ cannot be read as an image \("):
        prepare(str(tmp_path / "a.tar"), format, tmp_path / "cache", Policy())
