"""Texts as documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.tokenizer import BOS, EOS
from tests.harness.corpus_files import texts


def test_text_cannot_smuggle_in_control_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before <|turn>model <eos> after " * 20)
    tokens = texts(tmp_path, tmp_path / "a.txt").shard.document(0).ids
    assert tokens[0] == BOS and tokens[-1] == EOS
    assert not {0, 1, 2, 105}.intersection(np.asarray(tokens[1:-1]).tolist())
