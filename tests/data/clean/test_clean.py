"""Texts through filters and de-duplication: what goes, why, in which order, and what the rest is good for."""

from __future__ import annotations

import csv
import gzip
import multiprocessing
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from data.clean.steps import FirstOfEach
from data.corpus.prepare import prepare
from data.corpus.text import TextFormat
from tests.data.clean.texts import cleaned, contents, counts, lines, prose, texts_of

GOOD = [prose(seed) for seed in range(8)]
BAD = {
    "texts: blank": " \n",
    "gopher_quality: gopher_short_doc": prose(20, 2),
    "gopher_quality: gopher_long_doc": prose(21, 40),
    "gopher_quality: gopher_below_alpha_threshold": prose(22) + " ".join(map(str, range(1000, 1040))),
    "gopher_quality: gopher_too_many_hashes": prose(23).replace(" ", " #"),
    "gopher_quality: gopher_enough_stop_words": prose(24).replace(" the ", " ein ").replace(" of ", " von "),
    "gopher_repetition: dup_line_frac": "\n".join([prose(25).splitlines()[0]] * 6),
    "gopher_repetition: top_2_gram": prose(26).replace(" the ", " the abcdefghijklmnopqrstuv "),
    "c4: curly_bracket": prose(27).replace(".", " {a}.", 1),
    "c4: lorem_ipsum": prose(28).replace(".", " Lorem ipsum.", 1),
    "c4: too_few_sentences": prose(29).replace(".", ","),
    "fineweb: char_dup_ratio": "\n".join([*prose(30, 24).splitlines(), prose(30, 24).splitlines()[0]]),
}
FILTERS = ["gopher_quality", "gopher_repetition", "c4", "fineweb"]


def test_each_filter_drops_what_it_should_and_says_why(tmp_path: Path) -> None:
    source = lines(tmp_path / "texts.jsonl", [*GOOD, *BAD.values()])
    keys = {"filters": FILTERS, "dedup": "none", "max_words": 400}
    report = cleaned(source, tmp_path / "out", **keys)
    assert counts(report) == dict.fromkeys(BAD, 1)
    assert texts_of(tmp_path / "out") == GOOD
    sizes = {reason: len(text.encode()) for reason, text in BAD.items()}
    assert {reason: dropped["bytes"] for reason, dropped in report["dropped"].items()} == sizes
    assert report["bytes_in"] == report["bytes_out"] + sum(sizes.values()) and report["bytes_cut"] == 0
    short = report["dropped"]["gopher_quality: gopher_short_doc"]["examples"]
    assert [found["document"] for found in short] == [f"{source}: document 10"]
    assert " ".join(prose(20, 2).split()).startswith(short[0]["begins"])


def test_c4_takes_lines_out_of_what_it_keeps(tmp_path: Path) -> None:
    source = lines(tmp_path / "texts.jsonl", [GOOD[0] + "\nno end of a sentence here", GOOD[1]])
    report = cleaned(source, tmp_path / "out", filters=["c4"], dedup="none")
    assert texts_of(tmp_path / "out") == GOOD[:2]
    assert (report["bytes_cut"], report["documents_out"]) == (len("\nno end of a sentence here"), 2)
    kept = cleaned(source, tmp_path / "kept", filters=["c4"], dedup="none", end_punctuation=False)
    assert (kept["bytes_cut"], kept["bytes_out"]) == (0, kept["bytes_in"])


def mixed(folder: Path) -> Path:
    """Four files of several containers; the last has twice, and first, what others have at their ends."""
    a, b, c, d = folder / "a.jsonl", folder / "b.txt", folder / "c.csv", folder / "d.jsonl.gz"
    lines(a, [GOOD[0], GOOD[1], GOOD[2]])
    b.write_text(GOOD[3])
    with c.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], [GOOD[4]], [GOOD[2]]])
    lines(folder / "d", [GOOD[2], GOOD[3], GOOD[5], GOOD[5], "Ab.", "Ab."])
    d.write_bytes(gzip.compress((folder / "d").read_bytes()))
    (folder / "d").unlink()
    return folder


@pytest.mark.parametrize("dedup", ["exact", "minhash"])
def test_the_first_of_equal_documents_stays(dedup: str, tmp_path: Path) -> None:
    source, out = mixed(tmp_path / "texts"), tmp_path / "out"
    report = cleaned(source, out, filters=[], dedup=dedup, tasks=4)
    assert texts_of(out) == [*GOOD[:6], "Ab."]
    assert counts(report) == {f"{dedup}: duplicate": 5}
    assert len(list((out / "documents").iterdir())) == 4 and not (out / "work").exists()
    found = report["dropped"][f"{dedup}: duplicate"]["examples"]
    assert [example["document"].removeprefix(f"{source}/") for example in found] == [
        *("c.csv: document 2", "d.jsonl.gz: document 1", "d.jsonl.gz: document 2")
    ]
    corpus = prepare(str(out / "documents"), TextFormat(None, 400), tmp_path / "cache")
    ids = [corpus.shard.document(index).ids for index in range(corpus.shard.num_documents)]
    assert [corpus.tokenizer.decode([*found]) for found in ids] == texts_of(out)


def test_documents_that_are_nearly_alike_are_found(tmp_path: Path) -> None:
    long, log = (
        prose(40, 40),
        [f"Machine {number} of the hall has had {number} faults and runs." for number in range(20)],
    )
    texts = [GOOD[0], long, GOOD[1], long.replace("Ab", "Xy").swapcase() + " And one more.", *log]
    source = lines(tmp_path / "texts.jsonl", texts)
    keys = {"filters": [], "dedup": "minhash"}
    assert counts(cleaned(source, tmp_path / "out", **keys)) == {"minhash: duplicate": 1}
    assert texts_of(tmp_path / "out") == [*texts[:3], *log]
    report = cleaned(source, tmp_path / "same", same_numbers=True, **keys)
    assert counts(report) == {"minhash: duplicate": 20}
    assert texts_of(tmp_path / "same") == [*texts[:3], log[0]]


def test_clusters_keep_their_first_document_whatever_joins_them(tmp_path: Path) -> None:
    pairs = [(2, 0, 2, 1), (2, 1, 2, 2), (0, 5, 2, 2), (1, 3, 1, 9), (0, 7, 1, 3)]
    np.array(pairs[:3], "<u4").tofile(tmp_path / "00000_00.dups")
    np.array(pairs[3:], "<u4").tofile(tmp_path / "00001_00.dups")
    FirstOfEach(tmp_path, tmp_path / "out").run()
    removed = {path.name: np.fromfile(path, "<u4").tolist() for path in (tmp_path / "out").iterdir()}
    assert removed == {"000001.remove": [3, 9], "000002.remove": [0, 1, 2]}


KILLS_ONCE = """
import os, signal

class Model:
    def __init__(self, done):
        self.done = done

    def predict(self, text):
        if text.startswith("Stop") and not os.path.exists(self.done):
            open(self.done, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return ("__label__en",), [1.0]

def load_model(path):
    return Model(path + ".done")
"""


def many(folder: Path) -> Path:
    for number in range(6):
        texts = [prose(draw, 6) for draw in range(100 * number, 100 * number + 10)]
        lines(folder / f"{number}.jsonl", [*texts, *texts[:5], prose(0, 6), "short"])
    lines(folder / "4.jsonl", [*texts, "Stop " + prose(1000), prose(0, 6)])
    return folder


def test_a_killed_cleaning_goes_on_and_workers_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fasttext.py").write_text(KILLS_ONCE)
    monkeypatch.delitem(sys.modules, "fasttext", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    source, once, killed, model = many(tmp_path / "texts"), tmp_path / "once", tmp_path / "killed", tmp_path / "model"
    model.touch()
    keys = {"tasks": 6, "dedup": "minhash", "buckets": 4, "language": ["en"], "language_model": str(model)}
    process = multiprocessing.get_context("fork").Process(target=cleaned, args=(source, killed), kwargs=keys)
    process.start()
    process.join()
    done = killed / "logs" / "filter" / "completions"
    assert (process.exitcode, len([*done.iterdir()])) == (-signal.SIGKILL, 4)
    assert [path.name for path in (killed / "work" / "kept").glob(".*")] == [".00004.jsonl.zst.part"]
    first = (done / "00000").stat().st_mtime_ns
    report = cleaned(source, killed, **keys | {"workers": 2})
    assert counts(report) == {"minhash: duplicate": 41, "gopher_quality: gopher_short_doc": 5}
    assert report == cleaned(source, once, **keys) and contents(killed) == contents(once)
    assert cleaned(source, killed, **keys) == report and (done / "00000").stat().st_mtime_ns == first
