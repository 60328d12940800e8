"""A corpus of texts, prepared without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.corpus.prepare import Corpus, prepare
from data.corpus.shards import Document
from data.corpus.text import TextFormat
from tests.harness.runs import make_corpus


def texts(folder: Path, source: Path | None = None, vocab_size: int = 400) -> Corpus:
    return prepare(str(source or make_corpus(folder)), TextFormat(None, vocab_size), folder / "cache")


def ids_of(document: Document) -> list[int]:
    """Tokens of a document that was read from disk."""
    return np.asarray(document.ids).tolist()
