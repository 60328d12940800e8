"""Text of unknown origin as HTML that says nothing else."""

from __future__ import annotations

import unicodedata
from html import escape

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SHOWN = "\n\t\u200c\u200d"
"""Breaks, and the joiners that are parts of words and of emoji."""


def visible(text: str) -> str:
    """A text as HTML in which nothing is markup, and characters that show nothing or turn others around are named."""
    return "".join(f"<s>{ascii(c)[1:-1]}</s>" if _is_hidden(c) else escape(c) for c in text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _SHOWN
