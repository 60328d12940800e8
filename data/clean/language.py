"""Documents of some languages, as a model of fastText tells them apart that lies in a file of the user."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

_LABEL = "__label__"


class Language(BaseFilter):
    """Keeps what is in one of the languages with enough certainty. The library's own filter downloads its model."""

    name = "language"

    def __init__(self, languages: list[str], model: Path, least: float, exclusion_writer: Any) -> None:
        super().__init__(exclusion_writer)
        self.languages, self.model, self.least = languages, model, least

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether a document stays, or else the language that it is in."""
        labels, scores = _loaded(self.model).predict(" ".join(doc.text.split()))
        language = labels[0].removeprefix(_LABEL)
        if language not in self.languages:
            return False, language
        return True if scores[0] >= self.least else (False, f"{language} below {self.least}")


@lru_cache(1)
def _loaded(path: Path) -> Any:
    """The model, once for all tasks of a process."""
    import fasttext

    return fasttext.load_model(str(path))
