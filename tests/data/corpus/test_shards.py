"""Documents on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.corpus.shards import ShardError, Shards
from tests.harness.chat_files import chat, make, model, user


def test_damage_to_a_corpus_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path, [chat(user(), model())]).folder
    whole = (folder / "00000/details.jsonl").read_bytes()
    (folder / "00000/details.jsonl").write_bytes(whole[:-2])
    with pytest.raises(ShardError, match=r"details\.jsonl of another size .* delete the folder"):
        Shards(folder)
    (folder / "00000/details.jsonl").unlink()
    with pytest.raises(ShardError, match=r"cannot be read .* delete the folder"):
        Shards(folder)
