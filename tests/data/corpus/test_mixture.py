"""Sequences of several sources, each in its own order and in its share."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from data.batch import Row
from data.corpus.mixture import Mixture, Stage, Turns, shares_by_size, whole_parts
from data.corpus.open import Settings, Source, open_data
from model import ConfigError
from tests.harness.chat_files import TEXT_ONLY, TOKENIZER, chat, model, user, write
from tests.harness.runs import make_corpus


class Numbers(Dataset[Row]):
    def __getitem__(self, index: int) -> Row:
        number = torch.tensor([index])
        return Row(number, number, number, number)


def test_shares_of_any_first_sequences_are_within_one_of_the_weights() -> None:
    sets = [parts for count in (1, 2, 3, 4) for parts in combinations_with_replacement(range(1, 10), count)]
    worst = 0.0
    for parts in [*sets, (1, 1, 6, 6, 6), (1,) * 30 + (70,), (97, 1, 1, 1), (1, 3, 11, 31, 89)]:
        mixture = Turns([Stage(0, parts)])
        total, counts = sum(parts), [0] * len(parts)
        for index in range(2 * total):
            source, earlier = mixture.locate(index)
            assert earlier == counts[source], "the sequences of a source come in order, and none is left out"
            counts[source] += 1
            off = [abs(count - (index + 1) * part / total) for count, part in zip(counts, parts, strict=True)]
            worst = max(worst, *off)
        assert counts == [2 * part for part in parts]
    assert 0.9 < worst < 1


def test_weights_are_the_decimals_they_print_as() -> None:
    assert whole_parts([0.7, 0.3]) == [7, 3] and whole_parts([3, 1.5]) == [2, 1] and whole_parts([0.1] * 3) == [1] * 3
    turns = Turns([Stage(0, [0.75, 0.25])])
    mixture = Mixture([Numbers(), Numbers()], turns)
    assert [turns.locate(i)[0] for i in range(8)] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert turns.locate(4_000_000_003) == (1, 1_000_000_000)
    row = mixture[4_000_000_002]
    assert row.tokens_S.tolist() == [3_000_000_002] and row.source == 0 and mixture[3].source == 1
    assert turns.counts(4_000_000_003) == (3_000_000_003, 1_000_000_000) and turns.length is None
    for weights, message in (
        ([1, -2], "weight of -2;"),
        ([1, float("nan")], "weight of nan;"),
        ([1, float("inf")], "weight of inf;"),
        ([0.1234567, 1], "only after 11,234,567 sequences; give rounder ones"),
    ):
        with pytest.raises(ConfigError, match=message):
            whole_parts(weights)


def test_counts_are_exact_at_every_prefix_over_limits_stages_and_a_new_mixture() -> None:
    """Random mixtures: what `counts` says is what `locate` deals, each source in its order, up to its limit."""
    draw = random.Random(0)
    for _ in range(60):
        count = draw.randint(1, 4)
        firsts = sorted(draw.sample(range(1, 300), draw.randint(0, 2)))
        stages = [Stage(first, [draw.randint(0, 5) for _ in range(count)]) for first in (0, *firsts)]
        stages = [stage if any(stage.weights) else Stage(stage.first, [1] * count) for stage in stages]
        limits = [draw.choice((None, draw.randint(1, 120))) for _ in range(count)]
        since, used = draw.choice(
            ((0, [0] * count), (draw.randint(1, 200), [draw.randint(0, 50) for _ in range(count)]))
        )
        turns = Turns(stages, limits, since, used)
        counts = used.copy()
        for index in range(since, 500 if turns.length is None else turns.length):
            assert turns.counts(index) == tuple(counts)
            source, earlier = turns.locate(index)
            assert earlier == counts[source], "each source in order, none of its sequences left out"
            counts[source] += 1
            limit = limits[source]
            assert limit is None or counts[source] <= limit
            weights = next(stage.weights for stage in reversed(stages) if index >= stage.first)
            assert weights[source], "a source without weight has no turn"
        if turns.length is not None:
            assert turns.counts(turns.length) == tuple(counts)


def test_a_source_that_is_used_up_leaves_its_part_to_the_others() -> None:
    turns = Turns([Stage(0, [2, 1, 1])], [4, None, None])
    assert "".join(str(turns.locate(index)[0]) for index in range(14)) == "01020101212121"
    turns = Turns([Stage(0, [1, 1])], [2, 3])
    assert turns.length == 5 and turns.counts(5) == (2, 3)
    turns = Turns([Stage(0, [3, 1]), Stage(8, [0, 1])])
    assert turns.counts(8) == (6, 2) and turns.counts(20) == (6, 14) and turns.locate(4_000_000_000)[0] == 1


def test_temperature_evens_out_sizes() -> None:
    assert shares_by_size([1, 1], [9_000_000, 1_000_000], 1) == [900, 100]
    assert shares_by_size([1, 1], [9_000_000, 1_000_000], 2) == [750, 250]
    assert shares_by_size([1, 0, 3], [100, 7, 100], 1) == [250, 0, 750]


def test_each_source_is_what_it_is_alone(tmp_path: Path) -> None:
    write(tmp_path, [chat(user(), model("A cat. " * (1 + number % 9))) for number in range(30)])
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    settings = Settings(TEXT_ONLY, 64, 3, tmp_path / "tokenizer.json", cache=tmp_path / "cache")
    texts, chats = Source(str(make_corpus(tmp_path)), 3, "text"), Source(str(tmp_path / "chats.jsonl"), 1, "chat")
    alone = [open_data([source], settings).dataset for source in (texts, chats)]
    mixed = open_data([texts, chats], settings)
    assert mixed.name == "3 x {} + 1 x {}".format(*(dataset.shard.digest for dataset in mixed.datasets))
    assert [str(dataset).partition(",")[0] for dataset in mixed.datasets] == ["120 documents", "30 conversations"]
    for index in range(4 * 3 * mixed.datasets[1].sequences_per_epoch):
        source = index % 4 // 3
        number = index // 4 if source else 3 * (index // 4) + index % 4
        found, wanted = mixed.dataset[index], alone[source][number]
        assert torch.equal(found.tokens_S, wanted.tokens_S) and torch.equal(found.labels_S, wanted.labels_S)
    assert number == 3 * mixed.datasets[1].sequences_per_epoch - 1, "three epochs of the rarer source"


def test_the_first_source_trains_the_tokenizer_of_all(tmp_path: Path) -> None:
    texts = str(make_corpus(tmp_path))
    (tmp_path / "b.txt").write_text("zebra quagga " * 40)
    settings = Settings(TEXT_ONLY, 64, 3, vocab_size=390, cache=tmp_path / "cache")
    mixed = open_data([Source(texts, 1, "text"), Source(str(tmp_path / "b.txt"), 1, "text")], settings)
    first, second = (dataset.corpus.folder / "tokenizer.json" for dataset in mixed.datasets)
    assert first.read_bytes() == second.read_bytes() and mixed.tokenizer_file == first
