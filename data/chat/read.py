"""Conversations and plain texts from lines of JSON, checked.

Whatever a line holds is read, or refused because its loss would change what is learned, or named as unused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.chat.fields import ConversationError, Fields, unfolded
from data.chat.foreign import refuse_in_line, refuse_in_text
from data.chat.media import place_media
from data.chat.messages import SYSTEM, read_messages, read_tools
from data.chat.render import Rendered, render
from data.chat.shapes import LineShape, canonical
from data.containers.records import read_records
from data.corpus.reading import Reading
from data.media.kept import keep_media
from model.errors import UserError

FLAGS = ("enable_thinking", "preserve_thinking", "add_generation_prompt", "continue_final_message")
"""Arguments of `render` that a line of a conversation file may set."""
ANY_SHAPE = LineShape()
_TEMPLATE_FLAGS = ("enable_thinking", "preserve_thinking")
"""Flags that "chat_template_kwargs" of a line may set too."""


@dataclass(frozen=True)
class PlainText:
    """A line of a file that is a text without roles, all of it learned."""

    where: str
    """File and line."""
    text: str
    unused: tuple[str, ...] = ()
    """Keys of the line that nothing reads."""
    shape: ClassVar[str] = "text"


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
    shape: str = "messages"
    """How the line was written, by its name in `data.chat.shapes`."""

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


def read_conversations(files: Iterable[Path], shape: LineShape = ANY_SHAPE) -> Iterator[Conversation | PlainText]:
    """One per line of JSONL: {"messages": [...]}, with "tools" and any of `FLAGS` if wanted, or {"text": "..."}.

    Lines of the other shapes of `data.chat.shapes` are read as if they were written so. Raises `UserError` for a line
    of no shape, and for contents that would be lost or learned against their meaning.
    """
    for path in files:
        reading = Reading([path])
        for where, found in read_records(path, reading):
            yield parse_line(keep_media(found, None), where, shape)
        reading.finish()


def parse_line(found: Any, where: str, shape: LineShape = ANY_SHAPE) -> Conversation | PlainText:
    """What one line of JSON holds; `where` is its file and line. Raises `ConversationError` for what is of no shape."""
    name, line = canonical(unfolded(found, where) if isinstance(found, dict) else found, where, shape)
    if name != PlainText.shape:
        return _conversation(line, name)
    text = line.take("text")
    line.check(isinstance(text, str), "text", "a string")
    refuse_in_text(line)
    if line.found.get("messages") is None:
        line.take("messages")
    line.close()
    return PlainText(where, text, tuple(line.unused))


def _conversation(line: Fields, shape: str) -> Conversation:
    found = line.take_list("messages", "a list of messages")
    flags = _flags(line)
    tools = read_tools(line)
    system = line.take("system") or ""
    line.check(isinstance(system, str), "system", "a string")
    refuse_in_line(line)
    messages = place_media(line, read_messages(line, found, flags.get("preserve_thinking", False)))
    if system.strip() and messages and messages[0]["role"] in SYSTEM:
        raise ConversationError(f'{line.where} has "system" and a first message of that role; keep one of them.')
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    if line.found.get("text") is None:
        line.take("text")
    line.close()
    return Conversation(line.where, messages, tools, flags, tuple(line.unused), shape)


def _flags(line: Fields) -> dict[str, bool]:
    """Flags of the line, and those under "chat_template_kwargs", which must not contradict them."""
    value = line.take("chat_template_kwargs")
    places: list[tuple[Fields, tuple[str, ...]]] = [(line, FLAGS)]
    if value is not None:
        inner = line.inside(value, "chat_template_kwargs", "an object with flags of the chat template")
        places.append((inner, _TEMPLATE_FLAGS))
    flags: dict[str, bool] = {}
    for fields, names in places:
        for name in names:
            flag = fields.take(name)
            fields.check(isinstance(flag, bool | None), name, "true or false")
            if flag is not None and flags.setdefault(name, flag) != flag:
                raise ConversationError(f"{fields.at(name)} is {str(flag).lower()}, and the line says otherwise.")
        if fields is not line:
            fields.close()
    return flags
