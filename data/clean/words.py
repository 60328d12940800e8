"""Words and sentences without a model of a language, so that filters need nothing but the library itself."""

from __future__ import annotations

import re

from datatrove.utils.word_tokenizers import WhitespaceTokenizer

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\s{_IDEOGRAPHS}]+|[{_IDEOGRAPHS}]")


class Words(WhitespaceTokenizer):
    """What stands between blanks, as the papers of the filters count words, and each ideograph.

    Sentences are found by the library's own expression. The library takes words from spaCy, which it does not bring.
    """

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text in order."""
        return _WORD.findall(text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words)

    def __hash__(self) -> int:
        return hash(Words)  # copies share what the library remembers of a text
