"""Sequences by their index: texts that are split, conversations that are whole; numbers are exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import IGNORE
from data.chat.documents import runs
from data.corpus.counts import Counts
from data.corpus.dataset import PackedDataset
from data.corpus.packing import Whole
from data.corpus.prepare import Corpus
from data.corpus.shards import Document, ShardError, Shards, part_name, write_index, write_shard
from data.tokenizer import BOS, EOS
from model import Gemma4Config
from tests.harness.chat_files import LENGTH as CHAT_LENGTH
from tests.harness.chat_files import TEXT_ONLY, TOKENIZER
from tests.harness.corpus_files import ids_of, texts

LENGTH = 48
TINY = Gemma4Config.from_name("gemma4_tiny_e4b")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return texts(tmp_path_factory.mktemp("corpus"))


def documents(dataset: PackedDataset, index: int) -> list[int]:
    return [piece.document for piece in dataset.pieces(index)]


def stored(folder: Path, chats: Iterable[tuple[list[int], list[bool]]]) -> Corpus:
    """A corpus of these tokens, without a source."""
    folder.mkdir()
    (folder / part_name(0)).mkdir()
    shard = write_shard(folder / part_name(0), (Document(ids, runs(supervised)) for ids, supervised in chats), 400)
    write_index(folder, [(shard, Counts())], 400, Counts())
    return Corpus(folder, Shards(folder), TOKENIZER, Whole)


def random_chats(lengths: Iterable[int]) -> Iterator[tuple[list[int], list[bool]]]:
    draw = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        yield [number // 300, number % 300, *draw.integers(400, size=length - 2).tolist()], [True] * length


def test_every_token_of_an_epoch_appears_once_and_epochs_differ(corpus: Corpus) -> None:
    dataset = PackedDataset(corpus, LENGTH, 3, TINY)
    count = dataset.sequences_per_epoch

    def tokens(epoch: int) -> torch.Tensor:
        return torch.cat([dataset[epoch * count + i].tokens_S for i in range(count)])

    shard, size = corpus.shard, corpus.shard.num_documents
    whole = torch.bincount(
        torch.tensor([i for document in range(size) for i in ids_of(shard.document(document))]), minlength=512
    )
    for epoch in (0, 1):
        missing = whole - torch.bincount(tokens(epoch), minlength=512)
        assert (missing >= 0).all() and missing.sum() == shard.num_tokens - count * LENGTH
    assert not torch.equal(tokens(0), tokens(1))
    assert torch.equal(tokens(1), tokens(1))


def test_labels_positions_and_documents_of_a_sequence(corpus: Corpus) -> None:
    dataset = PackedDataset(corpus, LENGTH, 3, TINY)
    cut = 0
    for i in range(dataset.sequences_per_epoch):
        sequence = dataset[i]
        same = sequence.document_ids_S[1:] == sequence.document_ids_S[:-1]
        assert torch.equal(sequence.labels_S[:-1][same], sequence.tokens_S[1:][same])
        assert (sequence.labels_S[:-1][~same] == IGNORE).all()
        assert (sequence.tokens_S[:-1][~same] == EOS).all() and (sequence.tokens_S[1:][~same] == BOS).all()
        assert (sequence.positions_S[1:][~same] == 0).all() and sequence.positions_S[0] == 0
        assert torch.equal(sequence.positions_S[1:][same], sequence.positions_S[:-1][same] + 1)
        cut += int(sequence.labels_S[-1] != IGNORE)
        assert (sequence.labels_S[-1] == IGNORE) == (sequence.tokens_S[-1] == EOS)
    assert cut, "some documents must run past the end of a sequence"


def test_a_corpus_shorter_than_a_sequence_repeats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short text")
    sequence = PackedDataset(texts(tmp_path, tmp_path / "a.txt", 370), 100, 0, TINY)[5]
    assert sequence.tokens_S.shape == (100,) and sequence.document_ids_S.max() >= 5


def test_a_row_of_two_conversations_and_padding(tmp_path: Path) -> None:
    chats = [([2, 10, 11, 12], [False, False, True, True]), ([2, 20, 21], [False, True, False])]
    dataset = PackedDataset(stored(tmp_path / "c", chats), 10, 0, TEXT_ONLY)
    labels = [[IGNORE, 11, 12, IGNORE], [20, IGNORE, IGNORE]]
    order = documents(dataset, 0)
    assert sorted(order) == [0, 1] and dataset.sequences_per_epoch == 1 and abs(dataset.packing.padding - 0.3) < 1e-12
    row = dataset[0]
    assert row.tokens_S.tolist() == [*chats[order[0]][0], *chats[order[1]][0], 0, 0, 0]
    assert row.labels_S.tolist() == [*labels[order[0]], *labels[order[1]], *[IGNORE] * 3]
    sizes = [len(labels[i]) for i in order] + [3]
    assert row.positions_S.tolist() == [position for size in sizes for position in range(size)]
    assert row.document_ids_S.tolist() == [0] * sizes[0] + [1] * sizes[1] + [2] * 3
    assert row.images == row.clips == ()


def test_every_conversation_is_in_one_row_of_an_epoch(tmp_path: Path) -> None:
    lengths = np.clip(np.random.default_rng(1).exponential(64, 1500).astype(int) + 3, 3, CHAT_LENGTH)
    corpus = stored(tmp_path / "c", random_chats(sorted(lengths.tolist())))  # in an order that packs badly
    dataset = PackedDataset(corpus, CHAT_LENGTH, 3, TEXT_ONLY)
    count, epochs = dataset.sequences_per_epoch, []
    for epoch in range(3):
        rows = [dataset[epoch * count + i] for i in range(count)]
        found, real = [], 0
        for i, row in enumerate(rows):
            chats = documents(dataset, epoch * count + i)
            pieces = [row.tokens_S[row.document_ids_S == number].tolist() for number in range(len(chats))]
            assert pieces == [ids_of(corpus.shard.document(number)) for number in chats]
            found += [300 * piece[0] + piece[1] for piece in pieces]
            real += sum(map(len, pieces))
            assert row.tokens_S.shape == (CHAT_LENGTH,) and int(row.document_ids_S.max()) <= len(chats)
        assert sorted(found) == list(range(1500)) and real == lengths.sum()
        assert dataset.packing.padding == 1 - real / (count * CHAT_LENGTH) < 0.03
        epochs.append([documents(dataset, epoch * count + i) for i in range(count)])
    assert epochs[0] != epochs[1] != epochs[2]
    together = [{frozenset(row) for row in rows} for rows in epochs]
    assert len(together[0] & together[1]) < count / 4
    again = PackedDataset(corpus, CHAT_LENGTH, 3, TEXT_ONLY)
    assert [documents(again, i) for i in range(2 * count, 3 * count)] == epochs[2]
    assert torch.equal(again[count + 1].tokens_S, dataset[count + 1].tokens_S)
    other = PackedDataset(corpus, CHAT_LENGTH, 4, TEXT_ONLY)
    assert [documents(other, i) for i in range(count)] != epochs[0]
    with pytest.raises(ShardError, match=r"more than data\.sequence_length=100; prepare it for that length"):
        PackedDataset(corpus, 100, 3, TEXT_ONLY)


def test_conversations_about_equally_long_change_rows(tmp_path: Path) -> None:
    dataset = PackedDataset(stored(tmp_path / "c", random_chats(range(256, 336))), 640, 0, TEXT_ONLY)
    assert dataset.sequences_per_epoch == 40
    first, second = ({frozenset(documents(dataset, 40 * epoch + i)) for i in range(40)} for epoch in (0, 1))
    assert len(first & second) < 15
