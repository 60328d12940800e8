"""Media parts of a conversation: the files that they name, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.chat.read import ConversationError
from data.chat.render import MEDIA_KINDS

_EXAMPLE = '{"type": "image", "path": "cat.png"}'


def media_paths(messages: Sequence[Mapping[str, Any]], kinds: Sequence[str], folder: Path) -> list[Path]:
    """Files of a conversation's media parts in the order in which they are written; `kinds` are those of the text.

    Relative paths start at `folder`. Raises `ConversationError` for a part that names no local file, or that the chat
    format leaves out.
    """
    parts = _media_parts(messages)
    lost = len(parts) - len(kinds)
    if lost:
        raise ConversationError(
            f"the chat format leaves out {lost} of {len(parts)} media parts (those in a system message, in what a tool "
            "returned that was not called, or after the text to continue); move each to a user message."
        )
    return [folder / _local_path(part) for part in parts]


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
    for key in ("path", "url", part["type"], MEDIA_KINDS[part["type"]]):
        named = part.get(key)
        if isinstance(named, Mapping):
            named = named.get("path") or named.get("url")
        if named and isinstance(named, str):
            break
    else:
        raise ConversationError(f"a media part of type {part['type']} names no file; give its path, as {_EXAMPLE}.")
    if "://" in named or named.startswith("data:"):
        raise ConversationError(f"{named[:80]} is not a local file; save it and give its path, as {_EXAMPLE}.")
    return Path(named)
