"""Tokenizers: a real `tokenizer.json`, or a small byte-level BPE with Gemma 4's special tokens made on the spot."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.errors import UserError
from model.hf import hub

PAD, EOS, BOS = 0, 1, 2
STOPS = (EOS, 106, 50)
"""<eos>, <turn|>, <|tool_response>: where generation ends."""

_NAMED = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    4: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}
SPECIAL_TOKENS: tuple[str, ...] = tuple(_NAMED.get(i, f"<unused{i}>") for i in range(107))
"""Control tokens in id order, at the ids the released tokenizer gives them."""
MEDIA_TOKENS = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")
"""Media tokens; a small vocabulary holds them in its last ids."""


class TokenizerError(UserError):
    """A tokenizer that cannot be used."""


@cache
def use_all_processors() -> None:
    """Let tokenizers work in threads here, and not in what is forked from here, where those threads are missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` pieces (if the text has that many merges)."""
    smallest = len(SPECIAL_TOKENS) + len(MEDIA_TOKENS) + 256
    if vocab_size < smallest:
        raise TokenizerError(
            f"data.tokenizer_vocab_size={vocab_size} has no room for bytes and special tokens; "
            f"smallest legal: {smallest}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MEDIA_TOKENS),
        special_tokens=[_control(token) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([_control(token) for token in MEDIA_TOKENS])
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`; raises `TokenizerError` if it is missing, damaged or not Gemma's."""
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"data.tokenizer={path} does not exist; give a tokenizer.json, or none to train one.")
    try:
        tokenizer = hub.load_tokenizer(path)
    except UserError as error:
        raise TokenizerError(f"data.tokenizer: {error}") from None
    for token_id in (PAD, EOS, BOS):
        if tokenizer.id_to_token(token_id) != _NAMED[token_id]:
            raise TokenizerError(
                f"data.tokenizer={path} has {tokenizer.id_to_token(token_id)!r} at id {token_id} where Gemma has "
                f"{_NAMED[token_id]!r}; give a Gemma tokenizer."
            )
    return tokenizer


def _control(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
