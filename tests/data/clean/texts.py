"""Texts that pass all filters, or fall through one of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import zstandard

from data.clean.clean import clean
from data.clean.settings import Cleaning


def prose(seed: int, sentences: int = 8) -> str:
    """Sentences of made-up words between those that English has everywhere; two to a line, none of them twice."""
    draw = random.Random(seed)

    def sentence() -> str:
        words = ["".join(draw.choices("abcdefghiklmnoprstuvw", k=draw.randint(3, 8))) for _ in range(12)]
        words[2], words[6], words[9] = "the", "and", "of"
        return " ".join(words).capitalize() + "."

    return "\n".join(f"{sentence()} {sentence()}" for _ in range(sentences // 2))


def lines(path: Path, texts: list[str]) -> Path:
    """A file of records with these texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def cleaned(source: Path, out: Path, **keys: Any) -> dict[str, Any]:
    """The report of a cleaning by one process, unless keys say otherwise."""
    report = clean(Cleaning(str(source), str(out), **{"workers": 1, **keys}))
    assert report is not None
    return report


def texts_of(out: Path) -> list[str]:
    """The texts of all shards in order."""
    found = []
    for path in sorted((out / "documents").iterdir()):
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            found += [json.loads(line)["text"] for line in file]
    return found


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of shards and report by their names."""
    return {path.name: path.read_bytes() for path in [*(out / "documents").iterdir(), out / "report.json"]}


def counts(report: dict[str, Any]) -> dict[str, int]:
    """How many documents went, by filter and reason."""
    return {reason: dropped["documents"] for reason, dropped in report["dropped"].items()}
