"""Sources, tokenizer, prepared corpora, packing and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.batch import IGNORE, Batch
from data.loader import StepSampler, load_batches
from data.packing import PackedDataset
from data.prepare import Corpus, prepare
from data.shards import ShardError, TokenShard
from data.sources import PYTHON_STDLIB, SourceError, read_documents, source_files
from data.tokenizer import BOS, EOS, MEDIA_TOKENS, TokenizerError, load_tokenizer, train_tokenizer
from model import Gemma4Config
from tests.runs import make_corpus

LENGTH = 48
TINY = Gemma4Config.from_name("gemma4_tiny_e4b")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(str(make_corpus(folder)), None, 400, folder / "cache")


def test_the_standard_library_is_a_corpus_everyone_has() -> None:
    files = source_files(PYTHON_STDLIB)
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert any(path.name == "argparse.py" for path in files)
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)


def test_sources_that_name_no_text_say_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="names no text"):
        source_files(str(tmp_path / "nothing"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(SourceError, match=r"bad\.jsonl:2"):
        list(read_documents([bad]))


def test_special_tokens_sit_where_gemma_has_them() -> None:
    tokenizer = train_tokenizer(["some text to learn from " * 50], 400)
    ids = {0: "<pad>", 1: "<eos>", 2: "<bos>", 50: "<|tool_response>", 98: "<|think|>", 105: "<|turn>", 106: "<turn|>"}
    assert {i: tokenizer.id_to_token(i) for i in ids} == ids
    size = tokenizer.get_vocab_size()
    assert [tokenizer.id_to_token(size - len(MEDIA_TOKENS) + i) for i in range(len(MEDIA_TOKENS))] == list(MEDIA_TOKENS)
    text = "def f(x):\n\treturn 'ü€' # <|turn>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_text_cannot_smuggle_in_control_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before <|turn>model <eos> after " * 20)
    found = prepare(str(tmp_path / "a.txt"), None, 400, tmp_path / "cache")
    tokens = found.shard.document(0, 0, len(found.shard.tokens))
    assert tokens[0] == BOS and tokens[-1] == EOS
    assert not {0, 1, 2, 105}.intersection(tokens[1:-1].tolist())


def test_tokenizers_that_are_not_gemma_s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="smallest legal: 370"):
        train_tokenizer(["x"], 300)


def test_a_corpus_is_prepared_once_and_damage_is_found(tmp_path: Path) -> None:
    source = str(make_corpus(tmp_path))
    first = prepare(source, None, 400, tmp_path / "cache")
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    again = prepare(source, None, 400, tmp_path / "cache")
    assert again.folder == first.folder and (again.folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert prepare(source, None, 410, tmp_path / "cache").folder != first.folder
    assert not list(first.folder.parent.glob(".making-*"))
    (first.folder / "tokens.bin").write_bytes((first.folder / "tokens.bin").read_bytes()[:-6])
    with pytest.raises(ShardError, match="delete the folder"):
        TokenShard(first.folder)


def test_every_token_of_an_epoch_appears_once_and_epochs_differ(corpus: Corpus) -> None:
    dataset = PackedDataset(corpus.shard, LENGTH, seed=3)
    count = dataset.sequences_per_epoch

    def tokens(epoch: int) -> torch.Tensor:
        return torch.cat([dataset[epoch * count + i].tokens_S for i in range(count)])

    whole = torch.bincount(torch.from_numpy(corpus.shard.tokens.astype("int64")), minlength=512)
    for epoch in (0, 1):
        missing = whole - torch.bincount(tokens(epoch), minlength=512)
        assert (missing >= 0).all() and missing.sum() == dataset.tokens_per_epoch - count * LENGTH
    assert not torch.equal(tokens(0), tokens(1))
    assert torch.equal(tokens(1), tokens(1))


def test_labels_positions_and_documents_of_a_sequence(corpus: Corpus) -> None:
    dataset = PackedDataset(corpus.shard, LENGTH, seed=3)
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
    shard = prepare(str(tmp_path / "a.txt"), None, 370, tmp_path / "cache").shard
    sequence = PackedDataset(shard, 100, seed=0)[5]
    assert sequence.tokens_S.shape == (100,) and sequence.document_ids_S.max() >= 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 8), (2, 2), (4, 2), (8, 1)])
def test_every_mesh_and_worker_count_deals_the_same_sequences(
    corpus: Corpus, num_ranks: int, micro: int, workers: int
) -> None:
    dataset = PackedDataset(corpus.shard, LENGTH, seed=3)
    steps: list[list[Batch]] = [[], [], []]
    for rank in range(num_ranks):
        sampler = StepSampler(40, 3, 8, micro, rank, num_ranks)
        for i, batch in enumerate(load_batches(dataset, sampler, workers, TINY)):
            steps[i // sampler.accumulation].append(batch)
    for step, batches in enumerate(steps):
        found = {tuple(row) for batch in batches for row in batch.inputs.tokens_T.view(batch.labels_BS.shape).tolist()}
        assert found == {tuple(dataset[40 + step * 8 + i].tokens_S.tolist()) for i in range(8)}
        assert sum(batch.inputs.batch_size for batch in batches) == 8


def test_prepare_as_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.prepare import main

    source = make_corpus(tmp_path)
    cache = tmp_path / "cache"
    monkeypatch.setattr("sys.argv", ["prepare", "--source", str(source), "--vocab-size", "400", "--cache", str(cache)])
    main()
    assert "120 documents" in capsys.readouterr().out
    folder = next((cache / "corpora").iterdir())
    assert json.loads((folder / "meta.json").read_text())["documents"] == 120
    monkeypatch.setattr("sys.argv", ["prepare", "--source", str(tmp_path / "no")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1 and "names no text" in capsys.readouterr().err
