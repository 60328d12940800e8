"""A source in parts: the same bytes whoever prepares them, and what is finished outlives its maker."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data.corpus.parts
from data.corpus.parts import Part, cut
from data.corpus.prepare import Corpus, Policy, prepare
from data.corpus.reading import Reading, SourceError, Span
from data.corpus.shards import ShardError
from data.corpus.sources import read_texts
from data.corpus.text import TextFormat
from model.errors import UserError
from tests.harness.chat_files import TOKENIZER
from tests.harness.corpus_files import ids_of
from tests.harness.processes import wait_until

PART_BYTES = 4_000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.corpus.parts, "PART_BYTES", PART_BYTES)


def source(folder: Path, lines: int = 400) -> Path:
    """Small files and a large one of lines, in a folder of their own."""
    found = folder / "source"
    found.mkdir()
    for name in ("a.txt", "b.txt", "z.txt"):
        (found / name).write_text(f"The file {name} is a text.\n" * 20)
    texts = [json.dumps({"text": f"Line {number} é " + "word " * (number % 9)}) for number in range(1, lines + 1)]
    (found / "large.jsonl").write_text("\n".join(texts))
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return found


def prepared(folder: Path, cache: str, workers: int, on_bad: str = "refuse") -> Corpus:
    policy = Policy(on_bad, workers=workers)
    return prepare(str(folder / "source"), TextFormat(folder / "tokenizer.json"), folder / cache, policy)


def contents(corpus: Path) -> dict[str, bytes]:
    return {str(file.relative_to(corpus)): file.read_bytes() for file in corpus.rglob("*") if file.is_file()}


def test_parts_cover_a_source_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    files = sorted(source(tmp_path).iterdir())
    parts = cut(files)
    size, spans = files[2].stat().st_size, [part.span for part in parts if part.span is not None]
    assert parts[0] == Part(0, 2, 1040) and parts[-1] == Part(3, 4, 520) and len(parts) == len(spans) + 2 > 5
    assert spans[0] == Span(0, spans[1].start, 1) and spans[-1].stop == size
    assert all(first.stop == second.start for first, second in itertools.pairwise(spans))
    whole = [text for text, _ in read_texts([files[2]], Reading([files[2]]))]
    apart = [text for span in spans for text, _ in read_texts([files[2]], Reading([files[2]], span=span))]
    assert apart == whole and len(whole) == 400
    for span in spans:
        text, _ = next(read_texts([files[2]], Reading([files[2]], span=span)))
        assert text.startswith(f"Line {span.line} ")


def test_a_line_longer_than_a_part_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text("x" * 3 * PART_BYTES + "\n" + "y" * 10 + "\n" + "z\n" * PART_BYTES)
    spans = [part.span for part in cut([tmp_path / "long.jsonl"])]
    assert spans[:2] == [Span(0, 12_001, 1), Span(12_001, 16_002, 2)] and len(spans) == 4


def test_any_number_of_processes_makes_the_same_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = (source(tmp_path) / "large.jsonl").read_text()
    caplog.set_level(logging.INFO, "gemwright")
    corpora = [prepared(tmp_path, f"cache{workers}", workers) for workers in (1, 2, 4)]
    first, *others = [contents(corpus.folder) for corpus in corpora]
    assert all(other == first for other in others) and "00001/tokens.bin" in first
    assert "4 processes prepare" in caplog.text
    shard = corpora[0].shard
    assert (shard.num_documents, shard.counts.kept, shard.num_tokens) == (403, 403, int(shard.lengths.sum()))
    assert len(set(shard.hashes.tolist())) == 403
    decoded = [TOKENIZER.decode(ids_of(shard.document(index)), skip_special_tokens=True) for index in (2, 401, 402)]
    assert [text[:9] for text in decoded] == ["Line 1 é ", "Line 400 ", "The file "]

    (tmp_path / "source" / "large.jsonl").write_text(lines.replace('{"text": "Line 321 ', '{"text" "Line 321 '))
    with pytest.raises(SourceError, match=r"large\.jsonl:321 is not JSON"):
        prepared(tmp_path, "cache2", 2)
    assert not [*(tmp_path / "cache2" / "corpora").glob(".making*")]
    assert prepared(tmp_path, "cache2", 2, "skip").shard.counts.bad == 1


def test_a_changed_byte_of_any_shard_names_the_file(tmp_path: Path) -> None:
    source(tmp_path)
    folder = prepared(tmp_path, "cache", 1).folder
    for file in ("00002/hashes.npy", "00003/tokens.bin"):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ShardError, match=f"{file} has another checksum"):
            prepared(tmp_path, "cache", 1)
        (folder / file).write_bytes(whole)


CODE = """
import sys, time; from pathlib import Path
import data.corpus.parts, data.corpus.prepare as module
from data.corpus.text import TextFormat
data.corpus.parts.PART_BYTES = int(sys.argv[2])
class Slow(TextFormat):
    def documents(self, tokenizer, reading):
        if reading.first > 0 and reading.span and reading.span.line > 100:
            time.sleep(60)
        yield from super().documents(tokenizer, reading)
folder = Path(sys.argv[1])
module.prepare(str(folder / "source"), Slow(folder / "tokenizer.json"), folder / "cache", module.Policy(workers=2))
"""


def test_parts_outlive_a_killed_maker_and_are_not_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source(tmp_path)
    root, corpora = Path(__file__).resolve().parents[3], tmp_path / "cache" / "corpora"
    maker = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path), str(PART_BYTES)], cwd=root)
    assert wait_until(lambda: len([*corpora.glob(".making-*/0*/.found.json")]) >= 3, 30)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    finished = {file.parent.name: file.stat().st_ino for file in corpora.glob(".making-*/0*/tokens.bin")}
    damaged = sorted(finished)[0]
    (next(corpora.glob(".making-*")) / damaged / "tokens.bin").write_bytes(b"other")
    caplog.set_level(logging.INFO, "gemwright")
    folder = prepared(tmp_path, "cache", 1).folder
    kept = {name for name, inode in finished.items() if (folder / name / "tokens.bin").stat().st_ino == inode}
    assert kept >= {*finished} - {damaged} and len(kept) >= 2
    assert f"{len(finished) - 1} of {len(cut(sorted((tmp_path / 'source').iterdir())))} parts of" in caplog.text
    assert contents(folder) == contents(prepared(tmp_path, "other", 1).folder)
    assert [file.name for file in corpora.iterdir() if file.name.startswith(".making")] == []


def test_a_stop_keeps_what_is_finished_and_ends_other_processes(tmp_path: Path) -> None:
    source(tmp_path)
    corpora = tmp_path / "cache" / "corpora"

    def told() -> None:
        if len([*corpora.glob(".making-*/0*")]) >= 2:
            raise UserError("told to stop.")

    format = TextFormat(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="told to stop"):
        prepare(str(tmp_path / "source"), format, tmp_path / "cache", Policy(check_stop=told, workers=2))
    assert len([*corpora.glob(".making-*/0*")]) >= 2 and os.path.exists(next(corpora.glob(".making-*/tokenizer.json")))
