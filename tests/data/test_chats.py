"""Conversations prepared once and packed whole; numbers are exact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data.chat_prepare
from data.batch import IGNORE
from data.chat import render
from data.chat_media import MediaFile, media_processor
from data.chat_packing import ChatDataset, plan_rows
from data.chat_prepare import ChatCorpus
from data.chat_shards import ChatShard, Counts, write_chats
from data.conversation import Encoded, encode, encode_text, truncate
from data.prepare import made_once
from data.shards import ShardError
from data.tokenizer import train_tokenizer
from model import UserError
from tests.data.chat_files import (
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


def stored(folder: Path, chats: Iterable[tuple[list[int], list[bool]]]) -> ChatCorpus:
    """A corpus of these tokens, without a source."""
    folder.mkdir()
    counts = Counts()
    write_chats(folder, ((Encoded(ids, supervised, [], []), []) for ids, supervised in chats), 400, counts)
    return ChatCorpus(folder, ChatShard(folder), TOKENIZER)


def random_chats(lengths: Iterable[int]) -> Iterator[tuple[list[int], list[bool]]]:
    draw = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        yield [number // 300, number % 300, *draw.integers(400, size=length - 2).tolist()], [True] * length


def test_a_row_of_two_conversations_and_padding(tmp_path: Path) -> None:
    chats = [([2, 10, 11, 12], [False, False, True, True]), ([2, 20, 21], [False, True, False])]
    dataset = ChatDataset(stored(tmp_path / "c", chats), 10, seed=0, config=TEXT_ONLY)
    labels = [[IGNORE, 11, 12, IGNORE], [20, IGNORE, IGNORE]]
    order = dataset.conversations(0)
    assert sorted(order) == [0, 1] and dataset.sequences_per_epoch == 1 and dataset.efficiency == 0.7
    row = dataset[0]
    assert row.tokens_S.tolist() == [*chats[order[0]][0], *chats[order[1]][0], 0, 0, 0]
    assert row.labels_S.tolist() == [*labels[order[0]], *labels[order[1]], *[IGNORE] * 3]
    sizes = [len(labels[i]) for i in order] + [3]
    assert row.positions_S.tolist() == [position for size in sizes for position in range(size)]
    assert row.document_ids_S.tolist() == [0] * sizes[0] + [1] * sizes[1] + [2] * 3
    assert row.images == row.clips == ()


def test_every_conversation_is_in_one_row_of_an_epoch(tmp_path: Path) -> None:
    lengths = np.clip(np.random.default_rng(1).exponential(64, 1500).astype(int) + 3, 3, LENGTH)
    corpus = stored(tmp_path / "c", random_chats(sorted(lengths.tolist())))  # in an order that packs badly
    dataset = ChatDataset(corpus, LENGTH, seed=3, config=TEXT_ONLY)
    count, epochs = dataset.sequences_per_epoch, []
    for epoch in range(3):
        rows = [dataset[epoch * count + i] for i in range(count)]
        found, real = [], 0
        for i, row in enumerate(rows):
            chats = dataset.conversations(epoch * count + i)
            pieces = [row.tokens_S[row.document_ids_S == number].tolist() for number in range(len(chats))]
            assert pieces == [corpus.shard.chat(number).ids.tolist() for number in chats]
            found += [300 * piece[0] + piece[1] for piece in pieces]
            real += sum(map(len, pieces))
            assert row.tokens_S.shape == (LENGTH,) and int(row.document_ids_S.max()) <= len(chats)
        assert sorted(found) == list(range(1500)) and real == lengths.sum()
        assert dataset.efficiency == real / (count * LENGTH) > 0.97
        epochs.append([dataset.conversations(epoch * count + i) for i in range(count)])
    assert epochs[0] != epochs[1] != epochs[2]
    together = [{frozenset(row) for row in rows} for rows in epochs]
    assert len(together[0] & together[1]) < count / 4
    again = ChatDataset(corpus, LENGTH, seed=3, config=TEXT_ONLY)
    assert [again.conversations(i) for i in range(2 * count, 3 * count)] == epochs[2]
    assert torch.equal(again[count + 1].tokens_S, dataset[count + 1].tokens_S)
    other = ChatDataset(corpus, LENGTH, seed=4, config=TEXT_ONLY)
    assert [other.conversations(i) for i in range(count)] != epochs[0]
    with pytest.raises(ShardError, match=r"more than data\.sequence_length=100; prepare it for that length"):
        ChatDataset(corpus, 100, seed=3, config=TEXT_ONLY)


def test_conversations_about_equally_long_change_rows(tmp_path: Path) -> None:
    dataset = ChatDataset(stored(tmp_path / "c", random_chats(range(256, 336))), 640, seed=0, config=TEXT_ONLY)
    assert dataset.sequences_per_epoch == 40
    first, second = ({frozenset(dataset.conversations(40 * epoch + i)) for i in range(40)} for epoch in (0, 1))
    assert len(first & second) < 15


@pytest.mark.parametrize("draw", ["exponential", "lognormal", "uniform"])
def test_rows_are_full_and_never_too_full(draw: str) -> None:
    random = np.random.default_rng(0)
    drawn = {
        "exponential": random.exponential(512, 5000),
        "lognormal": random.lognormal(5.9, 0.87, 5000),
        "uniform": random.uniform(2, 1024, 5000),
    }[draw]
    sizes = np.clip(drawn.astype(np.int64) + 2, 2, 4096)
    rows = plan_rows(sizes, 4096, random.permutation(len(sizes)))
    filled = [int(sizes[row].sum()) for row in rows]
    assert max(filled) <= 4096 and sorted(place for row in rows for place in row) == list(range(5000))
    assert sum(filled) / (4096 * len(rows)) > 0.98
    assert plan_rows(np.array([5, 7, 3, 5, 9]), 10, np.arange(5)) == [[0, 3], [1, 2], [4]]


def test_tokens_and_labels_are_those_of_the_rendered_text(tmp_path: Path) -> None:
    lines = [chat(user(), model(), user(), model("A bird.", reasoning="It sings.")), {"text": "A song."}]
    corpus = make(tmp_path, [*lines, chat(user(), model("A film."), enable_thinking=True)])
    wanted = [
        encode(render(lines[0]["messages"]), TOKENIZER),
        encode_text("A song.", TOKENIZER),
        encode(render([user(), model("A film.")], enable_thinking=True), TOKENIZER),
    ]
    dataset = ChatDataset(corpus, LENGTH, seed=0, config=TEXT_ONLY)
    row, order = dataset[0], dataset.conversations(0)
    assert row.tokens_S[row.document_ids_S < 3].tolist() == [token for i in order for token in wanted[i].ids]
    learned = ["A cat.<turn|><|channel>thought\nIt sings.\n<channel|>A bird.<turn|>", "A song.<eos>", "A film.<turn|>"]
    for number, i in enumerate(order):
        labels = row.labels_S[row.document_ids_S == number]
        assert TOKENIZER.decode(labels[labels != IGNORE].tolist(), skip_special_tokens=False) == learned[i]
        assert corpus.shard.chat(i).supervised.tolist() == wanted[i].supervised
    thinking = make(tmp_path, lines, thinking=True)
    assert "<|think|>" in TOKENIZER.decode(thinking.shard.chat(0).ids.tolist(), skip_special_tokens=False)


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
    assert corpus.counts == Counts(kept=4, cut=2, too_long=1, unsupervised=1)
    assert json.loads((corpus.folder / "meta.json").read_text())["counts"]["too_long"] == 1
    assert str(corpus.counts) == "4 conversations, 2 of them cut; left out: 1 too long, 1 with nothing supervised"
    items = [media_processor(E4B).image(files / "cat.png")] * 2
    whole = encode(render(long["messages"]), TOKENIZER, items)
    cut = corpus.shard.chat(0)
    assert cut.ids.tolist() == truncate(whole, 110).ids and len(whole.ids) > 110 > len(cut.ids)
    assert cut.media == [MediaFile("image", str(files / "cat.png"), *whole.media[0], items[0].num_tokens, 1)]
    assert corpus.shard.lengths.max() == 110
    dataset = ChatDataset(corpus, 110, seed=0, config=E4B)
    assert sum(len(dataset[i].images) for i in range(dataset.sequences_per_epoch)) == 1


def test_something_must_remain(tmp_path: Path) -> None:
    for lines, found in (
        ([], "0 with nothing"),
        ([chat(user())] * 2, "2 with nothing"),
        ([chat(user(), model())], "1"),
    ):
        with pytest.raises(UserError, match=f"leaves nothing to train on .*{found}") as raised:
            make(tmp_path, lines, sequence_length=8)
        assert "\n" not in str(raised.value) and not list((tmp_path / "cache" / "chats").iterdir())
    with pytest.raises(UserError, match="names no conversations"):
        prepared(tmp_path, TEXT_ONLY, source=str(tmp_path / "tokenizer.json"))


def test_conversations_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path, [chat(user(), model())])
    calls: list[object] = []
    monkeypatch.setattr(data.chat_prepare, "encode", lambda *given: calls.append(given) or encode(*given))
    assert prepared(tmp_path, TEXT_ONLY).folder == first.folder and not calls
    train_tokenizer(["another " * 20], 400).save(str(tmp_path / "other.json"))
    ways: list[dict[str, Any]] = [{"size": "large"}, {"thinking": True}, {"sequence_length": 500}]
    ways += [{"tokenizer": tmp_path / "other.json"}]
    found = {first.folder, *(prepared(tmp_path, TEXT_ONLY, **way).folder for way in ways)}
    seeing = model_config("gemma4_tiny_31b", soft_tokens=280)  # as many as a processor takes by itself
    found |= {prepared(tmp_path, config).folder for config in (E4B, E4B.replace(audio=None), seeing)}
    assert len(found) == len(calls) + 1 == 8 and not list((tmp_path / "cache" / "chats").glob(".making-*"))
    (tmp_path / "chats.jsonl").write_text((tmp_path / "chats.jsonl").read_text() + "\n")
    changed = prepared(tmp_path, TEXT_ONLY).folder
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "chats.jsonl").symlink_to(tmp_path / "chats.jsonl")
    linked = prepared(tmp_path, TEXT_ONLY, source=str(tmp_path / "linked")).folder
    assert len({*found, changed, linked}) == 10, "media lie beside the link"


def test_the_first_of_two_makers_wins(tmp_path: Path) -> None:
    def make_slowly(aside: Path) -> None:
        made_once(tmp_path / "made", lambda faster: (faster / "by").write_text("first") and None)
        (aside / "by").write_text("second")

    made_once(tmp_path / "made", make_slowly)
    assert (tmp_path / "made" / "by").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_damage_to_a_corpus_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path, [chat(user(), model())]).folder
    whole = (folder / "details.jsonl").read_bytes()
    (folder / "details.jsonl").write_bytes(whole[:-2])
    with pytest.raises(ShardError, match=r"details\.jsonl of another size .* delete the folder"):
        ChatShard(folder)
    (folder / "details.jsonl").unlink()
    with pytest.raises(ShardError, match=r"cannot be read .* delete the folder"):
        ChatShard(folder)
