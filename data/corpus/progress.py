"""How far the preparation of a source is: one line from time to time, whichever process does the work."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from model.errors import UserError

if TYPE_CHECKING:
    from data.corpus.shards import Document

log = logging.getLogger("gemwright")

_SECONDS = 10
"""Between two lines on how far it is."""
_FLUSH = 0.5
"""Seconds for which documents are counted before others learn of them."""
_BYTES, _DOCUMENTS, _TOKENS, _STOPPED = range(4)


class Progress:
    """Bytes read, documents and tokens made, of `total` bytes; `shared` counts those of other processes too."""

    def __init__(self, total: int, *, shared: bool = False) -> None:
        self._total = total
        numbers: Any = multiprocessing.Array("q", 4) if shared else [0] * 4
        self._numbers = numbers
        self._lock: AbstractContextManager[Any] = numbers.get_lock() if shared else nullcontext()
        self._started = self._told = time.monotonic()

    def add(self, size: int, documents: int = 0, tokens: int = 0) -> None:
        """Count what was done since."""
        with self._lock:
            for which, number in ((_BYTES, size), (_DOCUMENTS, documents), (_TOKENS, tokens)):
                self._numbers[which] += number

    def tell(self) -> None:
        """Log a line, unless one was logged in the last seconds."""
        now = time.monotonic()
        if now - self._told < _SECONDS:
            return
        self._told, seconds = now, now - self._started
        done, documents, tokens, _ = self._numbers[:]
        rate = done / seconds
        made = f", {documents:,} documents, {tokens / seconds:,.0f} tokens/s" if documents else ""
        left = max(self._total - done, 0) / max(rate, 1)
        log.info(
            "prepared %.1f of %.1f MB, %.2f MB/s%s, %d s left", done / 1e6, self._total / 1e6, rate / 1e6, made, left
        )

    def counting(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, counted as they pass."""
        made, tokens, told = 0, 0, time.monotonic()
        for document in documents:
            yield document
            made, tokens = made + (not document.goes_on), tokens + len(document.ids)
            if time.monotonic() - told > _FLUSH:
                self.add(0, made, tokens)
                made, tokens, told = 0, 0, time.monotonic()
        self.add(0, made, tokens)

    def stop(self) -> None:
        """Have every process that works on it give up."""
        self._numbers[_STOPPED] = 1

    def check_stop(self) -> None:
        """Raises `UserError` after `stop`."""
        if self._numbers[_STOPPED]:
            raise UserError("the preparation of the data was given up.")
