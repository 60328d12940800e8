"""Datasets that `datasets` saved, and those of the hub, from its cache on this machine."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.containers.records import RECORDS, read_records
from data.corpus.hub import fetched
from data.corpus.reading import Reading, SourceError
from data.corpus.sources import read_texts, source_files
from tests.harness.chat_files import chat, model, user
from tests.harness.container_files import (
    FEW,
    write_stream,
)


def saved_dataset(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    """What `save_to_disk` of `datasets` writes, and what its work leaves beside it."""
    folder.mkdir(parents=True)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text('{"splits": null}')
    for index in range(2):
        write_stream(folder / f"data-0000{index}-of-00002.arrow", records[index::2])
    write_stream(folder / "cache-0123456789abcdef.arrow", records)
    return folder


def test_a_dataset_that_was_saved_is_its_rows(tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "saved" / "train", FEW[:6])
    found = source_files(str(folder))
    assert [path.name for path in found.files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert found.passed_over == {} and source_files(str(folder), RECORDS) == found
    texts = [text for text, _ in read_texts(found.files, Reading(found.files))]
    assert texts == [record["text"] for record in FEW[0:6:2] + FEW[1:6:2]]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert source_files(str(tmp_path / "saved")).files == found.files
    saved_dataset(tmp_path / "saved" / "test", FEW[:6])
    with pytest.raises(SourceError, match=r"saved holds the splits test, train; name the files of one, by a folder or"):
        source_files(str(tmp_path / "saved"))


def test_a_folder_of_datasets_itself_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [chat(user(), model(f"A cat, {i}.")) for i in range(5)]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    (path,) = source_files(str(tmp_path / "saved"), RECORDS).files
    assert [value for _, value in read_records(path, Reading([]))] == json.loads(json.dumps(records))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in the hub's cache on this machine, which is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fetched.__globals__["_snapshot"].cache_clear()
    repo = tmp_path / "datasets--ann--birds"
    for revision, name in (("main", "1" * 40), ("refs/convert/parquet", "2" * 40)):
        (repo / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(name)
        for file in ("README.md", "data/train-0.jsonl.gz", "data/train-1.jsonl.gz", "data/test-0.jsonl.gz", "all.json"):
            (repo / "snapshots" / name / file).parent.mkdir(parents=True, exist_ok=True)
            packed = json.dumps([{"text": f"{file} of {name[0]}"}]).encode()
            (repo / "snapshots" / name / file).write_bytes(gzip.compress(packed[1:-1]) if "gz" in file else packed)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("hf:ann/birds/data/train-*", ["data/train-0.jsonl.gz of 1", "data/train-1.jsonl.gz of 1"]),
        ("hf://datasets/ann/birds/data/test-0.jsonl.gz", ["data/test-0.jsonl.gz of 1"]),
        ("hf:ann/birds@main/all.json", ["all.json of 1"]),
        ("hf://datasets/ann/birds@refs/convert/parquet/all.json", ["all.json of 2"]),
        ("hf://datasets/ann/birds@refs%2Fconvert%2Fparquet/**/test*", ["data/test-0.jsonl.gz of 2"]),
    ],
)
def test_a_dataset_of_the_hub_is_its_files(source: str, texts: list[str], hub: Path) -> None:
    found = source_files(source)
    assert [text for text, _ in read_texts(found.files, Reading(found.files))] == texts
    assert found.passed_over == {} and source_files(source, RECORDS) == found


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "hf:ann/birds",
            "data.source=hf:ann/birds holds the splits test, train; name the files of one, by a folder or a glob",
        ),
        ("hf:ann/birds/data", "data.source=hf:ann/birds/data holds the splits test, train; name the files"),
        ("hf:birds", "data.source=hf:birds names no dataset of the hub; write hf:OWNER/NAME, with @REVISION and /FILE"),
        ("hf:ann/birds/valid*", r"data.source=hf:ann/birds/valid* names no text; give a file, a folder or a glob"),
        (
            "hf:ann/fish",
            "dataset ann/fish at main could not be fetched from the hub (Cannot find an appropriate cached",
        ),
        (
            "hf:ann/birds@v1",
            "dataset ann/birds at v1 could not be fetched from the hub (Cannot find an appropriate cached",
        ),
    ],
)
def test_a_dataset_that_is_not_there_or_has_several_splits_is_refused(source: str, said: str, hub: Path) -> None:
    with pytest.raises(SourceError) as caught:
        source_files(source)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
