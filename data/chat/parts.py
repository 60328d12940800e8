"""Contents of messages: texts and media parts, checked, and without what nothing reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.chat.fields import ConversationError, Fields, check, check_value
from data.chat.render import MEDIA_KINDS, without_thoughts

MODEL = ("assistant", "model")
"""Roles whose messages are learned."""
_PARTS = ("text", *MEDIA_KINDS)


def read_content(message: Fields, role: str) -> Any:
    """Text, parts, or whatever else a tool returned."""
    content = message.take("content")
    if isinstance(content, list | tuple):
        content = [_part(message, part, f"content[{i}]") for i, part in enumerate(content)]
    elif role == "tool":
        message.check(not isinstance(content, Mapping), "content", "text, a list of parts or a number")
        check_value(content, message.at("content"))
    else:
        message.check(isinstance(content, str | None), "content", "a string or a list of parts")
    if role in MODEL and any(without_thoughts(text) != text for text in _texts(content)):
        message.drop("content between channel tokens")
    return content


def says_something(content: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether the model writes anything for a content of its own."""
    media = not isinstance(content, str) and any(part["type"] != "text" for part in content)
    return media or any(without_thoughts(text).strip() for text in _texts(content))


def file_of(holder: Fields, value: Any, place: str) -> str | None:
    """The file that a string names, or an object with a path or a url; None for none."""
    if isinstance(value, Mapping):
        inner = holder.inside(value, place, "an object with a path")
        named = [inner.take("path"), inner.take("url")]
        if inner.found.get("bytes") is None:
            inner.take("bytes")
        inner.close()
    else:
        named = [value]
    for name in named:
        holder.check(isinstance(name, str | None), place, "the path of a file")
    return _only([name for name in named if name], holder.at(place))


def _part(message: Fields, value: Any, place: str) -> dict[str, Any]:
    given = value.get("type") if isinstance(value, Mapping) else None
    kind = given if isinstance(given, str) else ""
    message.check(kind in _PARTS, f"{place}.type", f"one of {', '.join(_PARTS)}")
    part = message.inside(value, place, "an object with a type")
    part.take("type")
    read = {"type": kind, **(_text(part) if kind == "text" else _file(part, kind))}
    part.close()
    return read


def _text(part: Fields) -> dict[str, str]:
    text = part.take("text")
    part.check(isinstance(text, str), "text", "a string")
    _refuse_others(part, ("text",))
    for key in ("path", "url"):
        if part.found.get(key) is None:
            part.take(key)
    return {"text": text}


def _file(part: Fields, kind: str) -> dict[str, str]:
    """The file that a media part names; nothing if it names none."""
    own = (kind, MEDIA_KINDS[kind])
    _refuse_others(part, own)
    named = [file_of(part, part.take(key), key) for key in dict.fromkeys(("path", "url", *own))]
    file = _only([name for name in named if name], part.where)
    return {"path": file} if file else {}


def _refuse_others(part: Fields, own: Sequence[str]) -> None:
    """A part of one type that holds something of another would lose it."""
    for key in _PARTS:
        if key not in own and part.take(key):
            kind = part.found["type"]
            raise ConversationError(f'{part.where} has the type {kind} and "{key}" too; make that a part of its own.')


def _only(files: Sequence[str], where: str) -> str | None:
    check(len(set(files)) < 2, where, "one file; it names several")
    return files[0] if files else None


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"] if isinstance(content, list) else []
