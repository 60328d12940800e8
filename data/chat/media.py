"""Media of a conversation: files that a line lists, put into its messages, and files in the order of the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.chat.fields import ConversationError, Fields
from data.chat.parts import file_of
from data.chat.render import MEDIA_KINDS

_EXAMPLE = '{"type": "image", "path": "cat.png"}'
_LISTS = {"images": "image", "videos": "video", "audios": "audio"}
"""Keys of a line and the kind of the files that each lists."""


def place_media(line: Fields, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which each file that the line lists has its place.

    A place is <image>, <video> or <audio> in a text, or a media part without a file. Raises `ConversationError` unless
    there is one place for each file.
    """
    listed = {kind: _files(line, key) for key, kind in _LISTS.items() if line.take(key) is not None}
    if not listed:
        return list(messages)
    placed = [{**message, "content": _with_parts(message["content"], set(listed))} for message in messages]
    for key, kind in _LISTS.items():
        if kind in listed:
            places, files = list(_places(placed, kind)), listed[kind]
            if len(places) != len(files):
                raise ConversationError(
                    f"{line.at(key)} has length {len(files)}, and the messages have {len(places)} places for it; "
                    f"write <{kind}> once for each file, in the text where it is to be seen or heard."
                )
            for part, file in zip(places, files, strict=True):
                part["path"] = file
    return placed


def media_paths(messages: Sequence[Mapping[str, Any]], kinds: Sequence[str], folder: Path) -> list[Path]:
    """Files of a conversation's media parts in the order in which they are written; `kinds` are those of the text.

    Relative paths start at `folder`. Raises `ConversationError` for a part that names no local file, or that the chat
    format leaves out.
    """
    parts = _media_parts(messages)
    lost = len(parts) - len(kinds)
    if lost:
        raise ConversationError(
            f"the chat format leaves out {lost} of {len(parts)} media parts (those in a system message, or after the "
            "text to continue); move each to a user message."
        )
    return [folder / _local_path(part) for part in parts]


def _files(line: Fields, key: str) -> list[str]:
    listed = line.found[key]
    line.check(isinstance(listed, list | tuple), key, "a list of paths")
    files = []
    for i, value in enumerate(listed):
        file = file_of(line, value, f"{key}[{i}]")
        line.check(file is not None, f"{key}[{i}]", "the path of a file")
        files.append(str(file))
    return files


def _with_parts(content: Any, kinds: set[str]) -> Any:
    """A content whose markers of these kinds are media parts; one without is left as it is."""
    markers = re.compile("|".join(f"<({kind})>" for kind in sorted(kinds)))
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [part["text"] for part in parts if part["type"] == "text"] if isinstance(parts, list) else []
    if not any(map(markers.search, texts)):
        return content
    return [piece for part in parts for piece in _pieces(part, markers)]


def _pieces(part: dict[str, Any], markers: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    if part["type"] != "text":
        yield part
        return
    end = 0
    for marker in markers.finditer(part["text"]):
        yield {"type": "text", "text": part["text"][end : marker.start()]}
        yield {"type": marker[0][1:-1]}
        end = marker.end()
    yield {"type": "text", "text": part["text"][end:]}


def _places(messages: Sequence[Mapping[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Media parts of a kind that name no file yet."""
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if MEDIA_KINDS.get(part["type"]) == kind and "path" not in part:
                yield part


def _media_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What tools return is written before the content of the message that called them."""
    returned: list[list[Mapping[str, Any]]] = []
    own: list[list[Mapping[str, Any]]] = []
    for message in messages:
        content = message.get("content")
        parts = [part for part in content if part["type"] in MEDIA_KINDS] if isinstance(content, list) else []
        if message["role"] == "tool" and own:
            returned[-1] += parts
        else:
            returned.append([])
            own.append(parts)
    return [part for both in zip(returned, own, strict=True) for parts in both for part in parts]


def _local_path(part: Mapping[str, Any]) -> Path:
    named = part.get("path")
    if not named:
        raise ConversationError(f"a media part of type {part['type']} names no file; give its path, as {_EXAMPLE}.")
    if "://" in named or named.startswith("data:"):
        raise ConversationError(f"{named[:80]} is not a local file; save it and give its path, as {_EXAMPLE}.")
    return Path(named)
