"""Texts as a kind of corpus: every document between `<bos>` and `<eos>`, learned but for its first token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from data.corpus.packing import Split
from data.corpus.shards import Counts, Document
from data.corpus.sources import read_documents, source_files
from data.tokenizer import BOS, EOS, load_tokenizer, train_tokenizer

_DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class TextFormat:
    """Text files. Without a tokenizer, one of `vocab_size` pieces is trained on them."""

    tokenizer: Path | None
    vocab_size: int = 8192
    packing = Split
    fix = "give files with at least one document"

    def files(self, source: str) -> list[Path]:
        """The text files that a source names: itself, those of a folder, or of a glob."""
        return source_files(source)

    def settings(self, files: list[Path]) -> str:
        """All that the tokens depend on besides the files' contents, as a text for the cache's key."""
        return str(self.vocab_size if self.tokenizer is None else "given")

    def make_tokenizer(self, files: list[Path]) -> Tokenizer:
        """The given tokenizer, or one trained on these texts."""
        if self.tokenizer is None:
            return train_tokenizer(read_documents(files), self.vocab_size)
        return load_tokenizer(self.tokenizer)

    def check(self, tokenizer: Tokenizer) -> None:
        """Any tokenizer can read text."""

    def documents(self, files: list[Path], tokenizer: Tokenizer, counts: Counts) -> Iterator[Document]:
        """Each text as tokens between begin and end of text, all of them learned."""
        # A document cannot smuggle in control tokens: text spelling one is encoded piece by piece.
        tokenizer.encode_special_tokens = True
        texts = read_documents(files)
        while batch := list(islice(texts, _DOCUMENTS_PER_CALL)):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                counts.kept += 1
                yield Document.text([BOS, *encoding.ids, EOS])
