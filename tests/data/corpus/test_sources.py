"""Files of a source: what is read, what is named as passed over, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

import data.corpus.sources
from data.chat.documents import ChatFormat
from data.containers.records import RECORDS
from data.corpus.prepare import Policy, prepare
from data.corpus.reading import Reading, SourceError
from data.corpus.sources import PYTHON_STDLIB, read_texts, source_files
from data.corpus.text import TextFormat
from data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tests.harness.chat_files import TEXT_ONLY, chat, model, prepared, user, write
from tests.harness.corpus_files import ids_of


def read(*files: Path) -> list[str]:
    reading = Reading(list(files))
    found = [text for text, _ in read_texts(reading.files, reading)]
    reading.finish()
    return found


def test_the_standard_library_is_a_corpus_everyone_has() -> None:
    files = source_files(PYTHON_STDLIB).files
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert any(path.name == "argparse.py" for path in files)
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)


def mixed_folder(folder: Path) -> Path:
    folder.mkdir()
    names = ("b.txt", "a.md", "sub/c.jsonl", "x.xlsx", "y.parquet.gz", "z.JSON", "w.zip", "Makefile", "._a.txt")
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{{"text": "of {name}"}}')
    (folder / "none.txt").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "note.txt").write_text("hidden")
    shutil.copy(folder / "b.txt", folder / "again.txt")
    return folder


def test_every_file_of_a_folder_is_read_or_counted(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "texts")
    found = source_files(str(folder))
    assert [path.name for path in found.files] == ["a.md", "again.txt", "b.txt", "c.jsonl"]
    packed = {".parquet.gz": 1, ".zip": 1}
    kinds = {".xlsx": 1, ".json": 1, "without a suffix": 1, "empty": 1, "hidden": 2} | packed
    assert found.passed_over == kinds
    by_pattern = source_files(str(folder / "*"))
    assert [path.name for path in by_pattern.files] == ["Makefile", "a.md", "again.txt", "b.txt", "z.JSON"]
    assert by_pattern.passed_over == {".xlsx": 1, "empty": 1} | packed


def test_what_is_passed_over_is_said_once_and_refused_if_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mixed_folder(tmp_path / "texts")
    corpus = prepare(str(folder), TextFormat(None, 400), tmp_path / "cache")
    assert corpus.shard.counts.twice == 1 and corpus.shard.num_documents == 4
    (said,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert said == (
        f"{folder} holds what nothing reads: files: hidden (2), .json (1), .parquet.gz (1), .xlsx (1), .zip (1), "
        "empty (1), without a suffix (1)"
    )
    with pytest.raises(SourceError, match=r"holds what nothing reads \(files: .*; drop it, or set data\.strict=false"):
        prepare(str(folder), TextFormat(None, 400), tmp_path / "cache", Policy(strict=True))


def test_keys_that_nothing_reads_are_counted_and_refused_if_strict(tmp_path: Path) -> None:
    lines = [{"text": "one", "id": 1, "url": "a"}, {"text": "two", "id": 2}]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = prepare(str(source), TextFormat(None, 400), tmp_path / "cache").shard.counts
    assert counts.keys == {"id": 2, "url": 1} and "keys of lines: id (2), url (1)" in str(counts)
    with pytest.raises(SourceError, match=r"keys of lines: id \(2\), url \(1\)"):
        prepare(str(source), TextFormat(None, 400), tmp_path / "cache", Policy(strict=True))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("rows.xlsx", "save its sheet as .csv"),
        ("a.TGZ", "unpack it"),
        ("a.zip", "unpack it"),
        ("a.pdf", "take its text out into a .txt"),
        ("cat.png", "name it in a conversation"),
    ],
)
def test_a_file_that_is_no_text_by_its_name_is_refused(tmp_path: Path, name: str, how: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(SourceError, match=f"which is not read as text; {how}"):
        source_files(str(tmp_path / name))
    with pytest.raises(SourceError, match="names no conversations"):
        source_files(str(tmp_path / name), RECORDS)


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("wiki[en].jsonl", "e.jsonl", "what?.txt"):
        (tmp_path / name).write_text('{"text": "a"}')
        assert source_files(str(tmp_path / name)).files == [tmp_path / name]
    assert source_files(str(tmp_path / "?.jsonl")).files == [tmp_path / "e.jsonl"]
    folder = tmp_path / "all[1]"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert source_files(str(folder)).files == [folder / "a.txt"]


def test_sources_that_name_no_text_say_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="names no text; give a file"):
        source_files(str(tmp_path / "nothing"))
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(
        SourceError, match=r"names no text \(only 1 \.json\); give a .*\(\.json by its name or a glob\)"
    ):
        source_files(str(tmp_path))
    (tmp_path / "a.parquet.gz").write_text("a")
    with pytest.raises(SourceError, match=r"a \.parquet file that is compressed as a whole; unpack it\.$"):
        source_files(str(tmp_path / "a.parquet.gz"))


def test_everything_bad_is_named_at_once(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    deep = b"[" * 1_000_000
    bad = [
        b"{",
        b'{"txt": 1}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        deep,
        b"9" * 5000,
        b'{"text": "a", "text": "b"}',
    ]
    lines.write_bytes(b'\xef\xbb\xbf{"text": "good"}\r\n\n' + b"\n".join(bad) + b'\n{"text": "last"}')
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9s")
    files = [lines, tmp_path / "zero.txt", tmp_path / "latin.txt"]
    reading = Reading(files)
    assert [text for text, _ in read_texts(files, reading)] == ["good", "last"]
    with pytest.raises(SourceError) as caught:
        reading.finish()
    for part in (
        "lines.jsonl:3 is not JSON (Expecting property name enclosed in double quotes at character 3)",
        'lines.jsonl:4 has no "text" string',
        "lines.jsonl:6 is no UTF-8 (invalid start byte at byte 10)",
        "lines.jsonl:7 has half a surrogate pair at character 0",
        "lines.jsonl:8 is not JSON that can be read (nested too deep)",
        "lines.jsonl:9 is not JSON (Exceeds the limit",
        "lines.jsonl:10 is not JSON (an object has 'text' twice)",
        "zero.txt is no text in UTF-8 (a zero at byte 1)",
        "latin.txt is no text in UTF-8 (invalid continuation byte at byte 3)",
    ):
        assert part in str(caught.value)
    assert reading.counts.bad == 10 and "\n" not in str(caught.value)


def test_ten_bad_lines_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("{\n" * 25)
    with pytest.raises(SourceError, match=r"lines\.jsonl:10 is not JSON .*; and 15 more\. Mend or drop them, or set"):
        read(path)


def test_bad_lines_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [chat(user(), model()), {"messages": 3}, chat(user(), model())])
    with pytest.raises(SourceError, match=r"chats\.jsonl:2.*Mend or drop it, or set data\.on_bad=skip"):
        prepared(tmp_path, TEXT_ONLY)
    source, cache = str(tmp_path / "chats.jsonl"), tmp_path / "cache"
    format = ChatFormat(tmp_path / "tokenizer.json", TEXT_ONLY, 512)
    corpus = prepare(source, format, cache, Policy(on_bad="skip"))
    assert (corpus.shard.counts.kept, corpus.shard.counts.bad) == (2, 1)
    assert any("left out as data.on_bad=skip allows" in message for message in caplog.messages)
    with pytest.raises(SourceError, match="has 1 bad lines or files, left out when it was prepared"):
        prepare(source, format, cache)


def gemma_like() -> Tokenizer:
    """Like the released one: blanks are letters, nothing is split beforehand, unknown bytes have tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = [f"▁{word}" for word in ("the", "then", "there", "a", "an", "and", "or")] + ["the", "an", "\n\n", "▁▁"]
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words * 5, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte level", "as Gemma's"])
def test_a_large_text_is_one_document_of_the_same_tokens_in_bounded_blocks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["the", "then ", " there", "a\n", "\n\n", "an  and", "\n \n", "\tor", "é漢", "x" * 90, "\r\n", "it's 12 34"]
    text = "".join(f"{words[(7 * i + i * i) % len(words)]} {words[i % 5]}" for i in range(900))
    path, short = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_bytes(text.encode())
    short.write_text("the end")
    tokenizer = train_tokenizer([text], 400) if kind == "byte level" else gemma_like()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def corpus(cache: str) -> list[list[int]]:
        made = prepare(str(tmp_path / "*.txt"), TextFormat(tmp_path / "tokenizer.json"), tmp_path / cache)
        return [ids_of(made.shard.document(i)) for i in range(made.shard.num_documents)]

    whole = corpus("whole")
    monkeypatch.setattr(data.corpus.sources, "_BLOCK", 256)
    blocks = list(read_texts([path], Reading([path])))
    assert len(blocks) > 20 and max(len(block) for block, _ in blocks) < 800
    assert "".join(block for block, _ in blocks) == path.read_text()
    assert corpus("blocks") == whole and len(whole) == 2


def test_linked_folders_are_read_once_and_what_is_no_file_is_counted(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for place in (folder, elsewhere / "deep"):
        place.mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (elsewhere / "deep" / "b.txt").write_text("two")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "deep" / "round").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    expected = [folder / "a.txt", folder / "linked" / "deep" / "b.txt"]
    found = source_files(str(folder))
    assert (found.files, found.passed_over) == (expected, {"broken links": 1, "neither files nor folders": 1})
    assert source_files(str(folder / "**" / "*.txt")).files == expected


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read anything, so the system's answers are put in the place of its rights."""
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "in/b.txt"):
        (tmp_path / name).write_text("text")
    scandir, access = os.scandir, os.access

    def refuse(path: str) -> object:
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"/in cannot be read \(Permission denied\); give rights to it, or move"):
        source_files(str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt" and access(path, mode))
    for source in (tmp_path, tmp_path / "in" / "b.txt", tmp_path / "in" / "*.txt"):
        with pytest.raises(SourceError, match=r"in/b\.txt cannot be read \(Permission denied\); give rights to it"):
            source_files(str(source))
