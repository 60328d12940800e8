"""The command that prepares texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.prepare import main
from tests.harness.runs import make_corpus


def test_prepare_as_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = make_corpus(tmp_path), tmp_path / "cache"
    monkeypatch.setattr("sys.argv", ["prepare", f"source={source}", "vocab_size=400", f"cache={cache}"])
    main()
    assert "120 documents" in capsys.readouterr().out
    folder = next((cache / "corpora").glob("[!.]*"))
    assert json.loads((folder / "meta.json").read_text())["documents"] == 120
    report = json.loads((folder / "report.json").read_text())
    assert report["documents"] == 120 == sum(count for _, _, count in report["lengths"])
    assert report["bytes_per_token"] == source.stat().st_size / report["tokens"]
    assert (folder / "report.svg").read_text().startswith("<svg xmlns=")
    monkeypatch.setattr("sys.argv", ["prepare", f"source={tmp_path / 'no'}"])
    with pytest.raises(SystemExit, match=r"error: .*names no text"):
        main()
