"""What is kept from training: by contents alone, and really never in a training sequence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.corpus.held_out import ContentHash, hash_of, is_held_out
from data.corpus.open import Data, Settings, Source, open_data
from model import ConfigError, Gemma4Config
from tests.harness.chat_files import TOKENIZER, chat, model, text, user, write

CONFIG = Gemma4Config.from_name("tiny_31b", vision=None, audio=None)
LINES = [json.dumps({"text": f"document {number} " * (1 + number % 40)}) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return path


def settings(folder: Path, tokenizer: Path, held_out: float = 0.1) -> Settings:
    return Settings(CONFIG, 64, seed=3, tokenizer=tokenizer, cache=folder / "cache", held_out=held_out)


def texts(folder: Path, lines: list[str], name: str = "texts.jsonl") -> Source:
    (folder / name).write_text("\n".join(lines) + "\n")
    return Source(str(folder / name), 1, "text")


def ids(data: Data, name: str) -> set[bytes]:
    """Contents, as tokens, of the documents that measure the loss."""
    dataset = data.validation[name]
    return {np.asarray(dataset.shard.document(number).ids).tobytes() for number in dataset.documents.tolist()}


def test_the_share_is_kept_and_grows_by_documents() -> None:
    hashes = np.asarray([hash_of(f"text {number}") for number in range(20_000)], dtype=np.uint64)
    small, large = is_held_out(hashes, 0.01), is_held_out(hashes, 0.05)
    assert small.mean() == pytest.approx(0.01, abs=0.002) and large.mean() == pytest.approx(0.05, abs=0.005)
    assert large[small].all() and not is_held_out(hashes, 0.0).any()


def test_parts_of_a_text_hash_as_the_whole() -> None:
    parts = ContentHash()
    for part in ("a text", " that comes", " in parts"):
        parts.add(part)
    whole = ContentHash()
    whole.add("a text that comes in parts")
    assert parts.end() == whole.end() != parts.end()
    assert hash_of("ab", "c") != hash_of("a", "bc")


def test_no_training_sequence_holds_a_held_out_document(tmp_path: Path, tokenizer: Path) -> None:
    data = open_data([texts(tmp_path, LINES)], settings(tmp_path, tokenizer))
    trained, measured = data.datasets[0], data.validation["texts.jsonl"]
    assert 15 < len(measured.documents) < 50 and len(trained.documents) + len(measured.documents) == 300
    used = {p.document for i in range(2 * trained.sequences_per_epoch) for p in trained.pieces(i)}
    assert used == set(trained.documents.tolist())
    seen = {p.document for i in range(measured.sequences_per_epoch) for p in measured.pieces(i)}
    assert seen and seen <= set(measured.documents.tolist()) and not used & seen
    assert "without" in data.name


def test_order_copies_and_length_of_sequences_do_not_matter(tmp_path: Path, tokenizer: Path) -> None:
    asked = settings(tmp_path, tokenizer)
    expected = ids(open_data([texts(tmp_path, LINES)], asked), "texts.jsonl")
    turned = texts(tmp_path, [*LINES[::-1], *LINES[:100]], "turned.jsonl")
    found = open_data([turned], replace(asked, sequence_length=32, seed=9))
    assert ids(found, "turned.jsonl") == expected
    trained = found.datasets[0]
    kept = {np.asarray(trained.shard.document(number).ids).tobytes() for number in trained.documents.tolist()}
    assert not kept & expected, "a copy of a held-out document is trained on"


def test_conversations_split_alike_however_they_are_rendered_and_cut(tmp_path: Path, tokenizer: Path) -> None:
    write(
        tmp_path,
        [chat(user(text(f"Question {n}?")), model(f"Answer {n}."), user(), model("Yes. " * 40)) for n in range(100)],
    )
    source, asked = Source(str(tmp_path / "chats.jsonl"), 1, "chat"), settings(tmp_path, tokenizer, 0.2)
    short, thinking, large = (
        open_data([source], other).validation["chats.jsonl"]
        for other in (
            replace(asked, sequence_length=120),
            replace(asked, sequence_length=600, thinking=True),
            replace(asked, sequence_length=600, model=Gemma4Config.from_name("tiny_e2b", vision=None, audio=None)),
        )
    )
    assert short.shard.counts.cut == 100 and not thinking.shard.counts.cut, "the first are cut, the others whole"
    documents = short.documents.tolist()
    assert 8 < len(documents) < 35 and documents == thinking.documents.tolist() == large.documents.tolist()


def test_what_validation_sources_have_is_not_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    measured = texts(tmp_path, [*LINES[:20], json.dumps({"text": "only measured"})], "measured.jsonl")
    asked = replace(settings(tmp_path, tokenizer, 0.0), validation=[measured])
    data = open_data([texts(tmp_path, LINES)], asked)
    assert data.kept_away == 20 and data.datasets[0].documents.tolist() == [*range(20, 300)]
    assert {name: len(dataset.documents) for name, dataset in data.validation.items()} == {"measured.jsonl": 21}


def test_sources_of_one_name_are_told_apart(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "more").mkdir()
    sources = [texts(tmp_path, LINES), texts(tmp_path / "more", LINES[::2])]
    assert list(open_data(sources, settings(tmp_path, tokenizer)).validation) == ["texts.jsonl", "texts.jsonl_2"]


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = texts(tmp_path, LINES[:5])
    with pytest.raises(ConfigError, match=r"data.held_out=1e-06 holds out none of the 5 documents of .*; raise it"):
        open_data([source], settings(tmp_path, tokenizer, 1e-6))
    with pytest.raises(
        ConfigError, match=r"none of the 5 documents of .* is left to train on; lower data.held_out=0.9"
    ):
        open_data([source], settings(tmp_path, tokenizer, 0.999999))
    with pytest.raises(ConfigError, match="is left to train on"):
        open_data([source], replace(settings(tmp_path, tokenizer, 0.0), validation=[source]))
