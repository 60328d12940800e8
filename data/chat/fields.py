"""Objects of a line of JSON, read key by key, so that what nothing reads is known by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.errors import UserError

MOST_LEVELS = 100
"""Levels of lists and objects that arguments, schemas and results of tools may have."""
_HUGE = 10**1000
_LISTS = frozenset(("messages", "conversations", "images", "videos", "audios"))
"""Keys of a line that hold lists. Tools are read by `take_list`."""


class ConversationError(UserError):
    """A conversation that cannot be read, tokenised or cut."""


@dataclass
class Fields:
    """An object of a line, `place` where it is in it: nothing for the line itself, or such as "messages[0]"."""

    found: Mapping[str, Any]
    line: str
    """File and line."""
    place: str
    unused: dict[str, None]
    """Keys that nothing reads, of the line and of what is in it, in order; shared by all objects of a line."""
    taken: set[str] = field(default_factory=set)
    places: Mapping[str, str] = field(default_factory=dict)
    """Places that the user's line calls otherwise, with what it calls them; shared by all objects of a line."""

    @property
    def where(self) -> str:
        """File, line and place."""
        return f"{self.line}: {self.named(self.place)}" if self.place else self.line

    def at(self, place: str) -> str:
        """File, line and place of something in this object."""
        return f"{self.line}: {self.named(self._path(place))}"

    def named(self, path: str) -> str:
        """What the user's line calls a place of it."""
        end = len(path)
        while end > 0:
            if path[:end] in self.places:
                return self.places[path[:end]] + path[end:]
            end = max(path.rfind(mark, 0, end) for mark in ".[ ")
        return path

    def take(self, key: str) -> Any:
        """The value of a key that is now read; None without it."""
        self.taken.add(key)
        return self.found.get(key)

    def take_list(self, key: str, legal: str) -> list[Any]:
        """The list that a key holds, perhaps as JSON text; an empty one for null or no text."""
        value = self.take(key)
        if value and isinstance(value, str):
            value = parse_text(value, self.at(key), legal)
        self.check(value in (None, "") or isinstance(value, list | tuple), key, legal)
        return list(value or ())

    def inside(self, value: Any, place: str, legal: str) -> Fields:
        """The object at a place in this one, such as "content[2]". Raises `ConversationError` if it is none."""
        self.check(isinstance(value, Mapping), place, legal)
        return Fields(value, self.line, self._path(place), self.unused, places=self.places)

    def check(self, fine: bool, place: str, legal: str) -> None:
        """Raises `ConversationError`, which says that something in this object must be `legal`, unless it is `fine`."""
        if not fine:
            check(False, self.at(place), legal)

    def drop(self, key: str) -> None:
        """Name something that nothing reads, alike in any line."""
        self.unused[re.sub(r"\[\d+\]", "[]", self.named(self._path(key)))] = None

    def close(self) -> None:
        """Name every key that was not taken."""
        for key in self.found:
            if key not in self.taken:
                self.drop(printable(key))

    def _path(self, place: str) -> str:
        return f"{self.place}.{place}" if self.place else place


def check(fine: bool, where: str, legal: str) -> None:
    """Raises `ConversationError`, which says that what is at `where` must be `legal`, unless it is `fine`."""
    if not fine:
        raise ConversationError(f"{where} must be {legal}; mend or drop the line.")


def shown(value: object) -> str:
    """A value of a line as part of a sentence, shortened."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(key: str) -> str:
    """A key that somebody chose, in a form that fits in a line."""
    return key if key.isprintable() and len(key) <= 60 else shown(key)


def parse_text(text: str, where: str, legal: str) -> Any:
    """What a text of JSON inside a line holds. Raises `ConversationError` if it holds none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        check(len(found) == len(pairs), where, "JSON in which no object has a key twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except ConversationError:
        raise
    except (ValueError, RecursionError):
        raise ConversationError(f"{where} must be {legal}, or its JSON as text; mend or drop the line.") from None


def unfolded(line: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A line in which lists that stand as JSON text, as in a table, are lists; no text there is none.

    Raises `ConversationError` for a text that begins like JSON and is none.
    """
    opened = dict(line)
    for key in _LISTS.intersection(line):
        value = line[key]
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{", ""):
            opened[key] = parse_text(value, f"{where}: {key}", "a list") if value.strip() else None
    return opened


def check_value(value: Any, where: str) -> None:
    """Raises `ConversationError` for a value that is too deep to be written, not finite, or no whole text."""
    level = [value]
    for _ in range(MOST_LEVELS):
        for item in level:
            _check_leaf(item, where)
        level = [inner for item in level for inner in _items(item)]
        if not level:
            return
    raise ConversationError(f"{where} has lists or objects of more than {MOST_LEVELS} levels; mend or drop the line.")


def _check_leaf(item: Any, where: str) -> None:
    if isinstance(item, float):
        check(math.isfinite(item), where, f"without {item}, which JSON has no number for")
    elif isinstance(item, int):
        check(abs(item) < _HUGE, where, "without numbers of more than 1000 digits")
    elif isinstance(item, str):
        check(_is_whole(item), where, "without half a surrogate pair")


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple) else []


def _is_whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
