"""What a cleaning refuses, each in one line that names the fix."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.clean.folder import Folder, begin, held, make_plan
from data.clean.settings import CleanError, Cleaning
from launch.clean import main
from tests.data.clean.texts import cleaned, counts, lines, prose, texts_of

Refuse = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refuse:
    """What the command says of words; source and out are given unless the words have them."""
    source = lines(tmp_path / "texts.jsonl", [prose(0), prose(1)])

    def refused(*words: str) -> str:
        given = [f"source={source}", f"out={tmp_path / 'out'}"]
        keys = {word.partition("=")[0] for word in words}
        monkeypatch.setattr("sys.argv", ["clean", *(w for w in given if w.partition("=")[0] not in keys), *words])
        with pytest.raises(SystemExit) as error:
            main()
        return str(error.value)

    return refused


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("filters=[gopher_qualty]", "filters=gopher_qualty does not exist; nearest: gopher_quality (all: "),
        ("dedup=min_hash", "dedup=min_hash does not exist; nearest: minhash (all: exact, minhash, none)."),
        ("filter=[c4]", "filter is no argument; nearest: filters (all: source, out, filters, "),
        ("workers=two", "workers=two has the wrong type; workers is a whole number."),
        ("workers=-1", "workers=-1 is below 0; give 0 or more."),
        ("tasks=5000", "tasks=5000 is above 4096; give 4096 or fewer."),
        ("filters=[c4,c4]", "filters= has c4 twice; give it once."),
        ("min_sentences=3", "min_sentences=3 has no effect without filters=c4; add that, or drop it."),
        ("buckets=20", "buckets=20 has no effect without dedup=minhash; add that, or drop it."),
        ("partition=cpu", "partition=cpu has no effect without executor=slurm; add that, or drop it."),
        ("executor=slurm", "executor=slurm needs partition=; give one that `sinfo` lists."),
        ("max_words=20", "max_words=20 is below min_words=50; nothing would be left."),
        ("source=nowhere", "data.source=nowhere names no text; give a file, a folder or a glob of "),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_is_made(
    word: str, said: str, refusal: Refuse, tmp_path: Path
) -> None:
    assert refusal(word).startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_is_refused(refusal: Refuse) -> None:
    said = "error: filters=[] with dedup=none leaves nothing to do; give a filter, or dedup=exact."
    assert refusal("filters=[]", "dedup=none") == said


def test_a_folder_that_is_not_this_cleaning_s_is_refused(refusal: Refuse, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    lines(other / "mine.jsonl", ["mine"])
    said = f"error: out={other} holds mine.jsonl, which no cleaning wrote; give a new folder."
    assert refusal(f"out={other}") == said and [path.name for path in other.iterdir()] == ["mine.jsonl"]
    assert refusal(f"source={other}", f"out={tmp_path}").startswith(
        f"error: out={tmp_path} holds {other / 'mine.jsonl'} "
    )
    cleaned(tmp_path / "texts.jsonl", out, dedup="none")
    said = f"error: out={out} was begun with dedup=none, not exact; give that, or a new folder."
    assert refusal() == said
    lines(tmp_path / "texts.jsonl", [prose(0)])
    said = f"error: out={out} was begun with other files ({tmp_path / 'texts.jsonl'} is new, gone or changed); "
    assert refusal("dedup=none").startswith(said)


def test_a_name_that_the_library_takes_for_a_pattern_is_refused(refusal: Refuse, tmp_path: Path) -> None:
    for name in ("run[1]", "a::b"):
        assert refusal(f"out={tmp_path / name}").startswith(f"error: out={tmp_path / name} has *, ?, [, ] or :: in it")


def test_what_was_changed_on_its_way_is_named(tmp_path: Path) -> None:
    source, out = lines(tmp_path / "texts.jsonl", [prose(0), prose(1)]), tmp_path / "out"
    cleaned(source, out)
    for path in (out / "report.json", out / "logs" / "write" / "completions" / "00000"):
        path.unlink()
    (out / "work" / "kept").mkdir(parents=True)
    (out / "work" / "kept" / "00000.jsonl.zst").write_bytes(b"not packed")
    with pytest.raises(
        CleanError, match=r"task 0 of write failed \(ZstdError: .*task_00000.log says where. If files of"
    ):
        cleaned(source, out)


def test_a_folder_is_filled_by_one_process(tmp_path: Path) -> None:
    asked = Cleaning(str(lines(tmp_path / "texts.jsonl", [prose(0)])), str(tmp_path / "out"))
    folder = begin(asked, make_plan(asked))
    with held(folder), pytest.raises(CleanError, match="is being filled by another process"), held(folder):
        pass
    assert folder == Folder(tmp_path / "out")


def test_texts_that_cannot_be_read_are_named_or_left_out(refusal: Refuse, tmp_path: Path) -> None:
    source = tmp_path / "mixed"
    lines(source / "a.jsonl", [prose(0), prose(1)])
    (source / "b.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    (source / "c.jsonl").write_text('{"text": 3}\n')
    said = refusal(f"source={source}")
    assert said == (
        f"error: {source}/b.txt is no text in UTF-8 (invalid start byte at byte 2); "
        f'{source}/c.jsonl:1 has no "text" string. Mend or drop them, or set data.on_bad=skip.'
    )
    report = cleaned(source, tmp_path / "skipped", on_bad="skip")
    assert (report["bad"], report["documents_in"], report["documents_out"]) == (2, 2, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_the_rest_goes_on(workers: int, tmp_path: Path) -> None:
    texts = [prose(seed, 40) for seed in range(40)]
    for part in range(2):
        lines(tmp_path / "texts" / f"{part}.jsonl", texts[part::2])
    keys = {"filters": ["gopher_quality"], "workers": workers, "tasks": 2}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writes fail as on a full disk
    try:
        with pytest.raises(
            CleanError, match=r"cannot be written or read \(File too large\); free space or give rights"
        ):
            cleaned(tmp_path / "texts", tmp_path / "out", **keys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    report = cleaned(tmp_path / "texts", tmp_path / "out", **keys)
    assert counts(report) == {} and texts_of(tmp_path / "out") == [*texts[0::2], *texts[1::2]]


def test_a_source_of_which_nothing_is_left_is_named(refusal: Refuse, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for source in (tmp_path / "empty.txt", lines(tmp_path / "short.jsonl", ["short"])):
        out = tmp_path / source.stem
        said = f"error: nothing is left of {source}; the table says why: loosen a threshold, or drop a filter."
        assert refusal(f"source={source}", f"out={out}") == said and not [*(out / "documents").iterdir()]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, refusal: Refuse) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    said = "error: cleaning takes datatrove, which is not installed; pip install gemwright[clean]."
    assert refusal() == said


def test_the_command_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = lines(tmp_path / "texts" / "texts.jsonl", [prose(0), prose(1), "short"])
    with source.open("a") as file:
        file.write(json.dumps({"text": prose(1), "url": "a"}) + "\n")
    (source.parent / "paper.pdf").write_bytes(b"%PDF")
    words = [f"source={source.parent}", f"out={tmp_path / 'out'}", "filters=[gopher_quality]"]
    monkeypatch.setattr("sys.argv", ["clean", *words])
    main()
    said = capsys.readouterr().out.splitlines()
    assert "not kept: keys of lines: url (1); files: .pdf (1)" in said
    table = [line.split("  ") for line in said]
    found = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in table}
    assert found["in"][:2] == ["4", "100.0%"] and found["out"][:2] == ["2", "50.0%"]
    assert found["gopher_quality: gopher_short_doc"] == ["1", "25.0%", "0.00", "texts.jsonl: document 3"]
    assert found["exact: duplicate"][0] == "1"
