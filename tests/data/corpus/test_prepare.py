"""Corpora are made once, whole, and under a name of their own."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data.corpus.making import made_once
from data.corpus.open import Settings, Source, open_data
from data.corpus.prepare import Policy, default_cache, prepare
from data.corpus.reading import SourceError
from data.corpus.shards import ShardError, Shards
from data.corpus.text import TextFormat
from model.errors import UserError
from tests.harness.chat_files import E4B, LENGTH, TOKENIZER, chat, model, text, user, write, write_media
from tests.harness.corpus_files import ids_of, texts
from tests.harness.fuzz import VALUES
from tests.harness.runs import make_corpus


def test_a_corpus_is_prepared_once_and_damage_is_found(tmp_path: Path) -> None:
    first = texts(tmp_path)
    stamp = (first.folder / "00000/tokens.bin").stat().st_mtime_ns
    again = texts(tmp_path, tmp_path / "corpus.jsonl")
    assert again.folder == first.folder and (again.folder / "00000/tokens.bin").stat().st_mtime_ns == stamp
    assert texts(tmp_path, tmp_path / "corpus.jsonl", 410).folder != first.folder
    assert not list(first.folder.parent.glob(".making-*")) and not (first.folder / "00000/details.jsonl").exists()
    (first.folder / "00000/tokens.bin").write_bytes((first.folder / "00000/tokens.bin").read_bytes()[:-6])
    with pytest.raises(ShardError, match="delete the folder"):
        Shards(first.folder)


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(SourceError, match=r"empty\.txt leaves nothing to train on .*at least one document"):
        texts(tmp_path, tmp_path / "empty.txt")
    assert not list((tmp_path / "cache" / "corpora").iterdir())


def test_the_first_of_two_makers_wins(tmp_path: Path) -> None:
    makers = list[str]()

    def make(aside: Path) -> None:
        makers.append(aside.name)
        threads[1].start()
        time.sleep(0.5)
        (aside / "by").write_text("first")

    threads = [threading.Thread(target=made_once, args=(tmp_path / "made", make)) for _ in range(2)]
    threads[0].start()
    for thread in threads:
        while not thread.ident:
            time.sleep(0.01)
        thread.join()
    assert makers == [".making-made"] and (tmp_path / "made" / "by").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_bytes_are_the_same_corpus_wherever_they_lie(tmp_path: Path) -> None:
    first, cache = texts(tmp_path), tmp_path / "cache"
    os.utime(tmp_path / "corpus.jsonl", (1, 1))
    (tmp_path / "staged").mkdir()
    copy = shutil.copyfile(tmp_path / "corpus.jsonl", tmp_path / "staged" / "renamed.jsonl")
    for source in (tmp_path / "corpus.jsonl", copy, tmp_path / "staged"):
        assert texts(tmp_path, source).folder == first.folder
    status = copy.stat()
    copy.write_text(copy.read_text().replace("a", "e", 1))  # as many bytes, of the same date
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert copy.stat().st_size == status.st_size and texts(tmp_path, copy).folder != first.folder
    assert len(list((cache / "corpora").glob("[!.]*"))) == 2


def test_a_staged_folder_reads_its_own_pictures(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    write_media(here)
    write(here, [chat(user({"type": "image", "path": "cat.png"}, text("What?")), model())])
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    settings = Settings(E4B, LENGTH, 0, tmp_path / "tokenizer.json", cache=tmp_path / "cache")

    def opened(folder: Path) -> tuple[str, list[str]]:
        data = open_data([Source(str(folder), 1, "chat")], settings)
        assert data.datasets[0].shard.counts.files == {"media that no line names": 3}, "wide.png, song.wav, film.mp4"
        assert len(data.dataset[0].images) == 1
        return data.name, [file.path for file in data.datasets[0].shard.document(0).media]

    name, paths = opened(here)
    shutil.move(here, tmp_path / "there")
    assert opened(tmp_path / "there") == (name, [str(tmp_path / "there" / "cat.png")])
    assert paths == [str(here / "cat.png")]


def test_a_corpus_in_which_any_byte_was_changed_is_refused(tmp_path: Path) -> None:
    folder = texts(tmp_path).folder
    source, format = str(tmp_path / "corpus.jsonl"), TextFormat(None, 400)
    for file in ("00000/tokens.bin", "00000/offsets.npy", "tokenizer.json"):
        whole = (folder / file).read_bytes()
        status = (folder / file).stat()
        (folder / file).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        os.utime(folder / file, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(ShardError, match=rf"{file} has another checksum\); delete the folder to prepare it again"):
            prepare(source, format, tmp_path / "cache")
        (folder / file).write_bytes(whole)
    assert prepare(source, format, tmp_path / "cache").folder == folder


def killed_maker(cache: Path) -> Path:
    """What a process leaves that is killed while it makes a folder in `cache`."""
    code = (
        "import os, sys; from pathlib import Path; from data.corpus.making import made_once\n"
        "def make(aside):\n"
        "    (aside / 'half').write_text('x'); print(aside, flush=True); sys.stdin.read()\n"
        "made_once(Path(sys.argv[1]) / 'made', make)\n"
    )
    root = Path(__file__).resolve().parents[3]
    maker = subprocess.Popen(
        [sys.executable, "-c", code, str(cache)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    aside = Path(maker.stdout.readline().strip())
    made_once(cache / "meanwhile", lambda _: None)
    assert (aside / "half").exists(), "a maker that lives keeps its folder"
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    return aside


def test_what_a_killed_preparation_left_goes_and_what_others_made_stays(tmp_path: Path) -> None:
    aside = killed_maker(tmp_path)
    foreign = tmp_path / ".making-mine"
    foreign.mkdir()
    made_once(tmp_path / "next", lambda _: None)
    assert not aside.exists() and foreign.exists()


def test_a_cache_that_cannot_be_written_or_found_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SourceError, match=r"cannot be kept in .*cache/corpora .*set data\.cache to a folder"):
        texts(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_cache().parts[-2:] == (".cache", "gemwright")
    code = "from data.corpus.prepare import default_cache; import os; os.setuid(54321); default_cache()"
    root, environment = Path(__file__).resolve().parents[3], {"PATH": os.environ["PATH"], "PYTHONPATH": ""}
    if os.getuid() == 0:  # a user without an entry, as in containers
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert "SourceError: there is no home folder to keep prepared data in; set data.cache" in done.stderr


def test_a_preparation_stops_when_told(tmp_path: Path) -> None:
    def told() -> None:
        raise UserError("told to stop by SIGTERM before the data was prepared; nothing was trained.")

    with pytest.raises(UserError, match="told to stop by SIGTERM"):
        prepare(str(make_corpus(tmp_path)), TextFormat(None, 400), tmp_path / "cache", Policy(check_stop=told))
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_damaged_metas_and_indexes_are_one_sentence(tmp_path: Path) -> None:
    folder = texts(tmp_path).folder
    source, draw, index = str(tmp_path / "corpus.jsonl"), random.Random(0), folder.parent / ".digests.json"
    meta = json.loads((folder / "meta.json").read_text())
    outcomes = set()
    for _ in range(300):
        changed = json.loads(json.dumps(meta))
        holder = draw.choice((changed, changed, changed["counts"], changed["sha256"]))
        key = draw.choice([*holder, "other"])
        holder[key] = draw.choice(VALUES)
        if draw.random() < 0.2:
            del holder[key]
        text_of_meta = json.dumps(changed)
        (folder / "meta.json").write_text(text_of_meta[: draw.choice((None, None, draw.randrange(len(text_of_meta))))])
        index.write_text(json.dumps(draw.choice(VALUES)))
        try:
            corpus = prepare(source, TextFormat(None, 400), tmp_path / "cache", Policy(verify=False))
            outcomes.add("used" if ids_of(corpus.shard.document(0)) else "empty")
        except ShardError as error:
            outcomes.add("refused" if "delete the folder to prepare it again" in str(error) else str(error))
    assert outcomes == {"used", "refused"}
