"""Documents of the wanted languages, told apart by a stand-in for fastText."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data.clean.settings import CleanError
from tests.data.clean.texts import cleaned, counts, lines, prose, texts_of

STAND_IN = """
class Model:
    def predict(self, text):
        assert chr(10) not in text
        language, score = text.split()[:2]
        return ("__label__" + language,), [float(score)]

def load_model(path):
    assert open(path).read() == "a model"
    return Model()
"""


def test_documents_of_other_languages_go_under_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fasttext.py").write_text(STAND_IN)
    monkeypatch.delitem(sys.modules, "fasttext", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lid.bin").write_text("a model")
    begins = ["en 0.9", "de 0.99", "fr 0.7", "en 0.5", "de 0.8"]
    texts = [f"{begin} {prose(seed)}" for seed, begin in enumerate(begins)]
    source = lines(tmp_path / "texts.jsonl", texts)
    keys = {"filters": [], "language": ["en", "fr"], "language_model": str(tmp_path / "lid.bin")}
    report = cleaned(source, tmp_path / "out", **keys)
    assert counts(report) == {"language: de": 2, "language: en below 0.65": 1}
    assert texts_of(tmp_path / "out") == [texts[0], texts[2]]


def test_a_language_needs_a_model_and_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(tmp_path / "texts.jsonl", [prose(0)])
    with pytest.raises(CleanError, match=r"language=en needs language_model=, the file of a .* lid.176.bin\.$"):
        cleaned(source, tmp_path / "out", language=["en"])
    with pytest.raises(CleanError, match=r"lid.176.bin; nowhere.bin is none\.$"):
        cleaned(source, tmp_path / "out", language=["en"], language_model="nowhere.bin")
    with pytest.raises(CleanError, match=r"language_score=0.5 has no effect without language; add that"):
        cleaned(source, tmp_path / "out", language_score=0.5)
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(CleanError, match=r"takes fasttext, which is not installed; pip install fasttext-numpy2-wheel"):
        cleaned(source, tmp_path / "out", language=["en"], language_model=str(source))
