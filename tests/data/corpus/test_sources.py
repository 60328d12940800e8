"""Files of a source, and the documents in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.corpus.sources import PYTHON_STDLIB, SourceError, read_documents, source_files


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
