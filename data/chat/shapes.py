"""Which of the known shapes a line of JSON has, and the line as {"messages": [...]} or {"text": "..."}.

| shape | keys of a line, those that it may lack after a semicolon |
|---|---|
| messages | messages |
| sharegpt | conversations or conversation, of {from, value} or {human, assistant} |
| alpaca | instruction, output; input, history |
| query | query or prompt or question, response or answer or output; history |
| completion | prompt, completion: two texts, or two lists of messages |
| gemini | contents of {role, parts}; systemInstruction |
| text | text |

Beside any but text: system, tools, media, flags of the chat template, as beside messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.chat.fields import ConversationError, Fields, printable
from data.chat.turns import ANSWERS, CONVERSATIONS, QUERIES, TURNS
from model.errors import ConfigError, nearest

AUTO = "auto"
_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (CONVERSATIONS,),
    "alpaca": (("instruction",), ("output",)),
    "query": (QUERIES, ANSWERS),
    "completion": (("prompt",), ("completion",)),
    "gemini": (("contents",),),
    "text": (("text",),),
}
"""Keys that a line of each shape has: one of each group."""
SHAPES = tuple(_KEYS)
_PROMPTS = {"prompt": "completion", "query": "response", "question": "answer", "instruction": "output"}
"""Keys of prompts, each with the key of the answer that its shape has."""
_LISTS = ("messages", *CONVERSATIONS, "contents")
_BESIDE = ("input", "history", "system", "systemInstruction", "tools", "images", "videos", "audios", "label")
COLUMNS = tuple(dict.fromkeys([*(name for groups in _KEYS.values() for names in groups for name in names), *_BESIDE]))
"""Names that the columns of a source may be given."""


@dataclass(frozen=True)
class LineShape:
    """How the lines of a source are read; auto goes by the keys of each line.

    columns: names of `COLUMNS`, each with the key under which the lines have it. Raises `ConfigError` for what is none.
    """

    name: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in (AUTO, *SHAPES):
            near = nearest(self.name, SHAPES)
            raise ConfigError(f"shape={self.name} does not exist; nearest: {near} (all: {', '.join((AUTO, *SHAPES))}).")
        for name, column in self.columns.items():
            if name not in COLUMNS:
                raise ConfigError(
                    f"columns={{{name}: {column}}} names nothing that is read; nearest: {nearest(name, COLUMNS)} "
                    f"(all: {', '.join(COLUMNS)})."
                )

    def __str__(self) -> str:
        return f"{self.name}/{json.dumps(sorted(self.columns.items()))}"


def canonical(found: Any, where: str, shape: LineShape) -> tuple[str, Fields]:
    """The name of a line's shape, and the line with its messages or its text; `where` is its file and line.

    Raises `ConversationError` for a line of no shape, of several, or that has not what its shape needs.
    """
    line = _renamed(found if isinstance(found, dict) else {}, where, shape.columns)
    name = _only_shape(line) if shape.name == AUTO else _given_shape(line, shape.name)
    if name not in TURNS:
        return name, line
    turns = TURNS[name](line)
    left = {key: value for key, value in line.found.items() if key not in line.taken}
    if left.get("messages") is not None:
        line.drop("messages")
    places = {**line.places, **turns.places}
    return name, Fields(left | {"messages": turns.messages}, where, "", line.unused, places=places)


def _renamed(found: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Fields:
    """The line with its columns under the names that are read; what had one of these names before is unused."""
    for name, column in columns.items():
        if column not in found:
            raise ConversationError(
                f'{where} has no "{printable(column)}", which data.columns gives as {name} ({_keys(found)}); name '
                "another key, mend or drop the line."
            )
    rest = {key: value for key, value in found.items() if key not in columns.values()}
    unused = {key: None for key in rest if key in columns}
    kept = {key: value for key, value in rest.items() if key not in columns}
    renamed = {name: found[column] for name, column in columns.items()}
    places = {name: printable(column) for name, column in columns.items() if name != column}
    return Fields(kept | renamed, where, "", unused, places=places)


def _only_shape(line: Fields) -> str:
    """The shape that the keys of a line tell. A list of messages goes before all others."""
    chosen = {key: line.found.get(key) for key in ("chosen", "rejected")}
    if None not in chosen.values():
        raise _preference(line, chosen["chosen"])
    if _is_list(line.found.get("messages")):
        return "messages"
    fits = {name: keys for name in SHAPES if (keys := _fitting(line, name))}
    if len(fits) > 1:
        readings = [f"{name} ({', '.join(map(line.named, keys))})" for name, keys in fits.items()]
        raise ConversationError(
            f"{line.where} can be read as {' and as '.join(readings)}; set "
            f"{' or '.join(f'data.shape={name}' for name in fits)}."
        )
    for name in fits:
        return name
    others = f", and fits no other shape ({_keys(line.found)}); name its columns with data.columns,"
    raise ConversationError(
        f'{line.where} has neither a "messages" list nor a "text" string{others if line.found else ";"} mend or drop '
        "the line."
    )


def _given_shape(line: Fields, name: str) -> str:
    for names in _KEYS[name]:
        if all(line.found.get(key) is None for key in names):
            raise ConversationError(
                f"{line.where} has no {' or '.join(names)}, which data.shape={name} reads ({_keys(line.found)}); name "
                f"its column as data.columns={{{names[0]}: ...}}, mend or drop the line."
            )
    return name


def _fitting(line: Fields, name: str) -> list[str]:
    """The keys by which a line has this shape; none if it has not."""
    keys = []
    for names in _KEYS[name]:
        present = [key for key in names if _may_be(key, line.found)]
        if not present:
            return []
        keys.append(present[0])
    return keys


def _may_be(key: str, found: Mapping[str, Any]) -> bool:
    """Whether a key holds something that can be read under its name."""
    value = found.get(key)
    if key == "text":
        return isinstance(value, str) and found.get("messages") is None
    return _is_list(value) if key in _LISTS else value is not None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith("["))


def _preference(line: Fields, chosen: Any) -> ConversationError:
    """The error for an answer that is preferred to another, with how that answer alone can be learned."""
    how = 'write it as the last of the line\'s messages, without "chosen" and "rejected"'
    begins = chosen[0] if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) else {}
    if begins.get("role") in ("system", "user"):
        how = "set data.shape=messages and data.columns={messages: chosen}"
    for prompt, completion in _PROMPTS.items():
        kind = type(line.found.get(prompt))
        if type(chosen) is kind and (kind is str or (kind is list and prompt == "prompt")):
            shape = next(name for name, groups in _KEYS.items() if len(groups) == 2 and completion in groups[1])
            how = f"set data.shape={shape} and data.columns={{{completion}: chosen}}"
    return ConversationError(
        f"{line.where} is a preference (chosen, rejected), from which no objective learns yet; to learn the chosen "
        f"answer alone, {how}."
    )


def _keys(found: Mapping[str, Any]) -> str:
    """The keys of a line as part of a sentence, shortened."""
    names = ", ".join(map(printable, found))
    return f"its keys: {names if len(names) <= 100 else f'{names[:97]}...'}"
