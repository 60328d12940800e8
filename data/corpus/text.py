"""Texts as a kind of corpus: every document between `<bos>` and `<eos>`, learned but for its first token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.corpus.held_out import ContentHash
from data.corpus.packing import Packing, Split
from data.corpus.reading import Reading
from data.corpus.shards import Document
from data.corpus.sources import SourceFiles, read_texts, source_files
from data.tokenizer import BOS, EOS, load_tokenizer, train_tokenizer

log = logging.getLogger("gemwright")

_TEXTS_PER_CALL, _CHARACTERS_PER_CALL = 256, 1 << 21


@dataclass(frozen=True)
class TextFormat:
    """Text files. Without a tokenizer, one of `vocab_size` pieces is trained on them."""

    tokenizer: Path | None
    vocab_size: int = 8192
    packing: type[Packing] = Split
    noun = "documents"
    max_media_tokens = None
    fix = "give files with at least one document"

    def files(self, source: str) -> SourceFiles:
        """The text files that a source names: itself, those of a folder, or of a glob."""
        return source_files(source)

    def settings(self) -> str:
        """All that the tokens depend on besides the contents of files, as a text for the cache's key."""
        return str(self.vocab_size if self.tokenizer is None else "given")

    def make_tokenizer(self, reading: Reading) -> Tokenizer:
        """The given tokenizer, or one trained on these texts."""
        if self.tokenizer is None:
            log.info("training a tokenizer of %d pieces", self.vocab_size)
            tokenizer = train_tokenizer((text for text, _ in read_texts(reading.files, reading)), self.vocab_size)
            if reading.on_bad == "refuse":
                reading.finish()
            return tokenizer
        return load_tokenizer(self.tokenizer)

    def check(self, tokenizer: Tokenizer) -> None:
        """Any tokenizer can read text."""

    def documents(self, tokenizer: Tokenizer, reading: Reading) -> Iterator[Document]:
        """Each text as tokens between begin and end of text, all learned; `reading` learns what was left out."""
        # A document cannot smuggle in control tokens: text spelling one is encoded piece by piece.
        tokenizer.encode_special_tokens = True
        begins, contents = True, ContentHash()
        for batch in _batches(read_texts(reading.files, reading)):
            encodings = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for (text, ends), encoding in zip(batch, encodings, strict=True):
                reading.counts.kept += ends
                ids = np.fromiter(chain([BOS] * begins, encoding.ids, [EOS] * ends), np.int64)
                contents.add(text)
                yield Document.text(ids, goes_on=not ends, content_hash=contents.end() if ends else 0)
                begins = ends


def _batches(texts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Few enough at once, by number and by length, for their tokens to be held."""
    batch: list[tuple[str, bool]] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _TEXTS_PER_CALL or sum(len(text) for text, _ in batch) >= _CHARACTERS_PER_CALL:
            yield batch
            batch = []
    if batch:
        yield batch
