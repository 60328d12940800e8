"""Tokenizers made on the spot, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.tokenizer import MEDIA_TOKENS, TokenizerError, load_tokenizer, train_tokenizer, use_all_processors
from parallel.world import World
from tests.harness.distributed import run_ranks


def test_special_tokens_sit_where_gemma_has_them() -> None:
    tokenizer = train_tokenizer(["some text to learn from " * 50], 400)
    ids = {0: "<pad>", 1: "<eos>", 2: "<bos>", 50: "<|tool_response>", 98: "<|think|>", 105: "<|turn>", 106: "<turn|>"}
    assert {i: tokenizer.id_to_token(i) for i in ids} == ids
    size = tokenizer.get_vocab_size()
    assert [tokenizer.id_to_token(size - len(MEDIA_TOKENS) + i) for i in range(len(MEDIA_TOKENS))] == list(MEDIA_TOKENS)
    text = "def f(x):\n\treturn 'ü€' # <|turn>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizers_that_are_not_gemma_s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="smallest legal: 370"):
        train_tokenizer(["x"], 300)


@pytest.mark.parametrize("name", ["truncation", "padding", "dropout"])
def test_settings_of_a_tokenizer_s_last_use_are_switched_off(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "some text to learn from " * 50
    tokenizer = train_tokenizer([text], 400)
    whole = tokenizer.encode(text).ids
    if name == "truncation":
        tokenizer.enable_truncation(32)
    elif name == "padding":
        tokenizer.enable_padding(length=5000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if name == "dropout":
        content["model"]["dropout"] = 0.5
    assert (content["model"] if name == "dropout" else content)[name] is not None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(text).ids == whole == loaded.encode_batch([text, "a"])[0].ids
    assert caplog.messages == [f"{tmp_path / 'tokenizer.json'} holds settings for {name}, which are switched off"]


def test_a_forked_process_tokenises_although_threads_did_before(capfd: pytest.CaptureFixture[str]) -> None:
    use_all_processors()
    tokenizer = train_tokenizer(["some text to learn from " * 50], 400)
    texts = ["some text", "to learn from"] * 64
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    def again(_: World) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    assert run_ranks(1, again, timeout=60) == [expected]
    assert "forked" not in capfd.readouterr().err
