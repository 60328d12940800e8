"""Conversations made into documents once; numbers are exact."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import data.chat.documents
from data.batch import IGNORE
from data.chat.documents import runs
from data.chat.encode import encode, encode_text, tokenise_all, truncate
from data.chat.render import render
from data.corpus.counts import Counts
from data.corpus.dataset import PackedDataset
from data.media.files import MediaFile, media_processor
from data.tokenizer import train_tokenizer
from model import UserError
from tests.harness.chat_files import (
    E4B,
    LENGTH,
    TEXT_ONLY,
    TOKENIZER,
    chat,
    make,
    model,
    model_config,
    prepared,
    text,
    user,
    write_media,
)
from tests.harness.corpus_files import ids_of


def test_tokens_and_labels_are_those_of_the_rendered_text(tmp_path: Path) -> None:
    lines = [chat(user(), model(), user(), model("A bird.", reasoning="It sings.")), {"text": "A song."}]
    corpus = make(tmp_path, [*lines, chat(user(), model("A film."), enable_thinking=True)])
    wanted = [
        encode(render(lines[0]["messages"]), TOKENIZER),
        encode_text("A song.", TOKENIZER),
        encode(render([user(), model("A film.")], enable_thinking=True), TOKENIZER),
    ]
    dataset = PackedDataset(corpus, LENGTH, 0, TEXT_ONLY)
    row, order = dataset[0], [piece.document for piece in dataset.pieces(0)]
    assert row.tokens_S[row.document_ids_S < 3].tolist() == [token for i in order for token in wanted[i].ids]
    learned = ["A cat.<turn|><|channel>thought\nIt sings.\n<channel|>A bird.<turn|>", "A song.<eos>", "A film.<turn|>"]
    for number, i in enumerate(order):
        labels = row.labels_S[row.document_ids_S == number]
        assert TOKENIZER.decode(labels[labels != IGNORE].tolist(), skip_special_tokens=False) == learned[i]
        assert corpus.shard.document(i).supervised == runs(wanted[i].supervised)
    thinking = make(tmp_path, lines, thinking=True)
    assert "<|think|>" in TOKENIZER.decode(ids_of(thinking.shard.document(0)), skip_special_tokens=False)


def test_long_ones_are_cut_and_those_without_a_label_left_out(tmp_path: Path) -> None:
    files = write_media(tmp_path)
    image = {"type": "image", "path": "cat.png"}
    long = chat(user(image, text("What?")), model(), user(image, text("And?" * 30)), model("A bird."))
    lines = [
        long,
        chat(user(), model()),
        chat(user(text("a song " * 100)), model()),
        chat(user()),
        chat(user(), model("A song.")),
        {"text": "film " * 200},
    ]
    corpus = make(files, lines, E4B, sequence_length=110)
    assert corpus.shard.counts == Counts(kept=4, cut=2, too_long=1, unsupervised=1, shapes={"messages": 5, "text": 1})
    assert json.loads((corpus.folder / "meta.json").read_text())["counts"]["too_long"] == 1
    assert str(corpus.shard.counts) == "2 cut; left out: 1 too long, 1 with nothing supervised"
    items = [media_processor(E4B).image(files / "cat.png")] * 2
    whole = encode(render(long["messages"]), TOKENIZER, items)
    cut = corpus.shard.document(0)
    assert ids_of(cut) == truncate(whole, 110).ids and len(whole.ids) > 110 > len(cut.ids)
    sha256 = hashlib.sha256((files / "cat.png").read_bytes()).hexdigest()
    assert cut.media == [MediaFile("image", str(files / "cat.png"), *whole.media[0], items[0].num_tokens, 1, sha256)]
    assert corpus.shard.lengths.max() == 110
    dataset = PackedDataset(corpus, 110, 0, E4B)
    assert sum(len(dataset[i].images) for i in range(dataset.sequences_per_epoch)) == 1


def test_long_ones_are_dropped_or_refused_where_wanted(tmp_path: Path) -> None:
    lines = [chat(user(), model()), chat(user(), model(), user(text("And? " * 60)), model("A bird."))]
    cut = make(tmp_path, lines, sequence_length=110)
    assert cut.shard.counts == Counts(kept=2, cut=1, shapes={"messages": 2})
    dropped = prepared(tmp_path, TEXT_ONLY, sequence_length=110, on_long="drop")
    assert dropped.shard.counts == Counts(kept=1, too_long=1, shapes={"messages": 2})
    assert ids_of(dropped.shard.document(0)) == ids_of(cut.shard.document(0)) and dropped.folder != cut.folder
    with pytest.raises(UserError, match=r"chats.jsonl:2 has \d+ tokens, more than data.sequence_length=110. Mend"):
        prepared(tmp_path, TEXT_ONLY, sequence_length=110, on_long="refuse")


def test_something_must_remain(tmp_path: Path) -> None:
    for lines, found in (
        ([], "it is empty"),
        ([chat(user())] * 2, "2 with nothing"),
        ([chat(user(), model())], "1"),
    ):
        with pytest.raises(UserError, match=f"leaves nothing to train on .*{found}") as raised:
            make(tmp_path, lines, sequence_length=8)
        assert "\n" not in str(raised.value) and not list((tmp_path / "cache" / "corpora").iterdir())
    (tmp_path / "tokenizer.txt").touch()
    with pytest.raises(UserError, match=r"names no conversations: only \.jsonl, .* are read; write conversations as"):
        prepared(tmp_path, TEXT_ONLY, source=tmp_path / "tokenizer.txt")


def test_conversations_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path, [chat(user(), model())])
    calls: list[object] = []

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given)
        return tokenise_all(*given, **more)

    monkeypatch.setattr(data.chat.documents, "tokenise_all", counted)
    assert prepared(tmp_path, TEXT_ONLY).folder == first.folder and not calls
    train_tokenizer(["another " * 20], 400).save(str(tmp_path / "other.json"))
    ways: list[dict[str, Any]] = [{"thinking": True}, {"sequence_length": 500}, {"tokenizer": tmp_path / "other.json"}]
    found = {first.folder, *(prepared(tmp_path, TEXT_ONLY, **way).folder for way in ways)}
    seeing = model_config("gemma4_tiny_31b", soft_tokens=280)  # as many as a processor takes by itself
    large = TEXT_ONLY.replace(hidden_size_per_layer_input=0)  # the other chat template
    found |= {prepared(tmp_path, config).folder for config in (E4B, E4B.replace(audio=None), seeing, large)}
    assert len(found) == len(calls) + 1 == 8 and not list((tmp_path / "cache" / "corpora").glob(".making-*"))
    (tmp_path / "chats.jsonl").write_text((tmp_path / "chats.jsonl").read_text() + "\n")
    changed = prepared(tmp_path, TEXT_ONLY).folder
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "chats.jsonl").symlink_to(tmp_path / "chats.jsonl")
    linked = prepared(tmp_path, TEXT_ONLY, source=tmp_path / "linked").folder
    assert len({*found, changed}) == 9 and linked == changed, "the same bytes are the same corpus"
