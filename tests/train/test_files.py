"""A file that is replaced has all of the old text or all of the new."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from train.files import replace_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    replace_file(path, "old ä", mode=0o755)
    assert path.read_text(encoding="utf-8") == "old ä" and path.stat().st_mode & 0o777 == 0o755

    found = []

    def killed(source: Path, target: Path) -> None:
        found.append((source.read_text(), target.read_text(encoding="utf-8")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_file(path, "new")
    assert found == [("new", "old ä")] and path.read_text(encoding="utf-8") == "old ä"
    replace_file(path, "new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]
