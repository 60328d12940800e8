"""The error a user can mend: its message is one line that names the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Shown as that one line, without a traceback."""


class ConfigError(UserError):
    """A config that cannot work."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice closest in spelling to `word`."""
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=0.0)[0]
