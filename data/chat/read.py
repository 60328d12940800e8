"""Conversations and plain texts from lines of JSON, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat.render import MEDIA_KINDS, Rendered, render
from data.corpus.reading import Reading
from data.corpus.sources import read_lines
from model.errors import UserError

FLAGS = ("enable_thinking", "preserve_thinking", "add_generation_prompt", "continue_final_message")
"""Arguments of `render` that a line of a conversation file may set."""


class ConversationError(UserError):
    """A conversation that cannot be read, tokenised or cut."""


@dataclass(frozen=True)
class PlainText:
    """A line of a file that is a text without roles, all of it learned."""

    where: str
    """File and line."""
    text: str
    unused: tuple[str, ...] = ()
    """Keys of the line that nothing reads."""


@dataclass(frozen=True)
class Conversation:
    """A line of a file that holds messages, with the tools and template flags that go with them."""

    where: str
    """File and line."""
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    flags: dict[str, Any]
    unused: tuple[str, ...] = ()
    """Keys of the line, and of what is in it, that nothing reads."""

    def render(self, size: str, **flags: Any) -> Rendered:
        """`flags` win over those of the line. Raises `ConversationError` where `data.chat.render.render` refuses."""
        with located(self.where):
            return render(self.messages, tools=self.tools, size=size, **{**self.flags, **flags})


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors inside name the place they come from."""
    try:
        yield
    except UserError as error:
        raise ConversationError(f"{where}: {error}") from None


def read_conversations(files: Iterable[Path]) -> Iterator[Conversation | PlainText]:
    """One per line of JSONL: {"messages": [...]}, with "tools" and any of `FLAGS` if wanted, or {"text": "..."}.

    Other keys are left alone. Raises `UserError` for a line that is neither, and for contents that the chat format
    would drop without a word.
    """
    for path in files:
        reading = Reading([path])
        for where, found in read_lines(path, reading):
            yield parse_line(found, where)
        reading.finish()


def parse_line(found: Any, where: str) -> Conversation | PlainText:
    """What one line of JSON holds; `where` is its file and line. Raises `ConversationError` for neither kind."""
    if isinstance(found, dict) and isinstance(found.get("messages"), list):
        for i, message in enumerate(found["messages"]):
            _check_message(message, f"{where}: messages[{i}]")
        flags = {flag: found[flag] for flag in FLAGS if flag in found}
        for flag, value in flags.items():
            _check(isinstance(value, bool), f"{where}: {flag}", "true or false")
        _check(isinstance(found.get("tools"), list | None), f"{where}: tools", "a list of functions")
        return Conversation(where, found["messages"], found.get("tools"), flags)
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        return PlainText(where, found["text"])
    raise ConversationError(f'{where} has neither a "messages" list nor a "text" string; mend or drop the line.')


def _check_message(message: Any, where: str) -> None:
    _check(isinstance(message, dict) and isinstance(message.get("role"), str), where, "an object with a role")
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            place = f"{where}.content[{i}]"
            kind = part.get("type") if isinstance(part, dict) else None
            _check(kind in ("text", *MEDIA_KINDS), f"{place}.type", f"one of text, {', '.join(MEDIA_KINDS)}")
            _check(kind != "text" or isinstance(part.get("text"), str), f"{place}.text", "a string")
    elif message["role"] != "tool":
        _check(content is None or isinstance(content, str), f"{where}.content", "a string, a list of parts or null")


def _check(fine: bool, where: str, legal: str) -> None:
    if not fine:
        raise ConversationError(f"{where} must be {legal}; mend or drop the line.")
