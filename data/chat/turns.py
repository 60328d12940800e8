"""Messages made of lines of other shapes, each with the place that it came from.

Roles, contents and calls are checked afterwards, where all messages are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.chat.fields import ConversationError, Fields, parse_text
from data.chat.foreign import role_of
from data.chat.parts import MODEL

QUERIES, ANSWERS = ("query", "prompt", "question"), ("response", "answer", "output")
CONVERSATIONS = ("conversations", "conversation")
_CALLS = ("function_call", "tool_call")
_CALL = 'a call {"name": "...", "arguments": {...}}'
_MESSAGES, _PAIRS = "a list of messages", "a list of pairs, each a question and its answer"


class Turns:
    """Messages under construction, of the line whose keys they are made of."""

    def __init__(self, line: Fields) -> None:
        self.line = line
        self.messages: list[dict[str, Any]] = []
        self.places: dict[str, str] = {}
        """Places in the messages, with what the user's line calls them."""

    def say(self, role: str, text: str, place: str) -> None:
        """Add a text that stands at a place of the line."""
        self.add({"role": role, "content": text}, place)
        self.name("content", place)

    def add(self, message: dict[str, Any], place: str) -> None:
        """Add a message that stands at a place of the line."""
        self.messages.append(message)
        self.places[f"messages[{len(self.messages) - 1}]"] = self.line.named(place)

    def name(self, key: str, place: str) -> None:
        """What is under a key of the last message stands at a place of the line."""
        self.places[f"messages[{len(self.messages) - 1}].{key}"] = self.line.named(place)


class _Calls:
    """Calls in one turn of a dialogue, and the messages that answer them in order."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self._calls: list[dict[str, Any]] = []
        self._answers: list[dict[str, Any]] = []
        self._where = ""

    def call(self, item: Fields, key: str, more: dict[str, Any]) -> None:
        """Add the calls under a key to those before, or, where these are answered, to a new message."""
        found = item.found.get(key)
        if isinstance(found, str):
            found = parse_text(found, item.at(key), _CALL)
        several = found if isinstance(found, list | tuple) else [found]
        if self._answers or not self._calls:
            self.settle()
            self._where = item.where
            self.turns.add({"role": "assistant", "content": "", "tool_calls": self._calls, **more}, item.place)
        for call in several:
            self.turns.name(f"tool_calls[{len(self._calls)}]", f"{item.place}.{key}")
            self._calls.append(dict(item.inside(call, key, _CALL).found))

    def say(self, message: dict[str, Any]) -> None:
        """Know of the next message, which answers a call or ends the turn."""
        if message["role"] == "tool":
            self._answers.append(message)
        else:
            self.settle()

    def settle(self) -> None:
        """Give each of several calls and its answer an id. Raises `ConversationError` if they are not as many."""
        calls, answers = self._calls, self._answers
        if len(calls) > 1 and answers and not any(answer.get("tool_call_id") for answer in answers):
            if len(calls) != len(answers):
                raise ConversationError(
                    f"{self._where} begins {len(calls)} calls, but the answers number {len(answers)}; give each call "
                    "its own, in the same order, or drop the line."
                )
            for i, (call, answer) in enumerate(zip(calls, answers, strict=True)):
                call["id"] = answer["tool_call_id"] = str(i)
        self._calls, self._answers = [], []


def _sharegpt(line: Fields) -> Turns:
    turns, list_key = Turns(line), _only(line, *CONVERSATIONS)
    calls = _Calls(turns)
    for i, value in enumerate(line.take_list(list_key, _MESSAGES)):
        item = line.inside(value, f"{list_key}[{i}]", "an object with from and value")
        if any(item.found.get(name) is not None for name in ("human", "assistant")):
            for name, role in (("human", "user"), ("assistant", "assistant")):
                turns.say(role, _text(item, name), f"{item.place}.{name}")
            item.close()
            continue
        role_key, content_key = _only(item, "from", "role"), _only(item, "value", "content")
        role, content = item.take(role_key), item.take(content_key)
        more = {key: value for key, value in item.found.items() if key not in ("from", "role", "value", "content")}
        if role in _CALLS:
            calls.call(item, content_key, more)
            continue
        message = {"role": role_of(role), "content": content, **more}
        calls.say(message)
        turns.add(message, item.place)
        turns.name("role", f"{item.place}.{role_key}")
        turns.name("content", f"{item.place}.{content_key}")
    calls.settle()
    return turns


def _alpaca(line: Fields) -> Turns:
    turns = _history(line)
    asked = [_text(line, "instruction"), "" if line.take("input") is None else _text(line, "input")]
    turns.say("user", "\n".join(filter(None, asked)), "instruction")
    turns.say("assistant", _text(line, "output"), "output")
    return turns


def _query(line: Fields) -> Turns:
    turns = _history(line)
    for role, names in (("user", QUERIES), ("assistant", ANSWERS)):
        key = _only(line, *names)
        turns.say(role, _text(line, key), key)
    return turns


def _history(line: Fields) -> Turns:
    turns = Turns(line)
    for i, pair in enumerate(line.take_list("history", _PAIRS)):
        texts = [text for text in pair if isinstance(text, str)] if isinstance(pair, list | tuple) else []
        line.check(len(texts) == 2 == len(pair), f"history[{i}]", "a pair of strings")
        for k, role in enumerate(("user", "assistant")):
            turns.say(role, texts[k], f"history[{i}][{k}]")
    return turns


def _completion(line: Fields) -> Turns:
    turns, prompt, completion = Turns(line), line.take("prompt"), line.take("completion")
    if isinstance(line.found.get("label"), bool):
        raise ConversationError(
            f"{line.where} is a preference (completion, label), from which no objective learns yet; keep the lines "
            f"whose {line.named('label')} is true, without it."
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        turns.say("user", prompt, "prompt")
        turns.say("assistant", completion, "completion")
        return turns
    fine = all(isinstance(value, list | tuple) for value in (prompt, completion))
    line.check(fine, "prompt", "a string beside a string as completion, or a list of messages beside such a list")
    for key, found in (("prompt", prompt), ("completion", completion)):
        for i, value in enumerate(found):
            message = dict(line.inside(value, f"{key}[{i}]", "an object with a role").found)
            if key == "prompt" and message.get("role") in MODEL:
                message["weight"] = message.get("weight") or 0
                line.check(message["weight"] == 0, f"prompt[{i}].weight", "0, since a prompt is not learned")
            turns.add(message, f"{key}[{i}]")
    return turns


def _gemini(line: Fields) -> Turns:
    turns, key = Turns(line), _only(line, "systemInstruction", "system_instruction")
    system = line.take(key)
    if system is not None:
        _parts(turns, line.inside(system, key, "an object with parts"), "system")
    for i, value in enumerate(line.take_list("contents", _MESSAGES)):
        item = line.inside(value, f"contents[{i}]", "an object with a role and parts")
        _parts(turns, item, role_of(item.take("role")))
    return turns


def _parts(turns: Turns, item: Fields, role: Any) -> None:
    """Add the message of a content of parts, all of which must be texts."""
    texts = []
    for i, part in enumerate(item.take_list("parts", "a list of parts")):
        inner = item.inside(part, f"parts[{i}]", "an object with a text")
        texts.append(_text(inner, "text"))
        inner.check(
            not any(value for key, value in inner.found.items() if key != "text"), "text", "all that a part holds"
        )
    content = texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
    more = {key: value for key, value in item.found.items() if key not in ("role", "parts")}
    turns.add({"role": role, "content": content, **more}, item.place)
    turns.name("content", f"{item.place}.parts")


def _only(fields: Fields, *names: str) -> str:
    """Which name of one thing an object uses; all are taken."""
    found = [name for name in names if fields.take(name) is not None]
    if len(found) > 1:
        first, second = map(fields.named, found[:2])
        how = "drop one." if fields.place else f"set data.columns={{{found[0]}: {second}}} to read the second alone."
        raise ConversationError(f'{fields.where} has "{first}" and "{second}", two names of one thing; {how}')
    return found[0] if found else names[0]


def _text(fields: Fields, key: str) -> str:
    value = fields.take(key)
    fields.check(isinstance(value, str), key, "a string")
    return str(value)


TURNS: Mapping[str, Callable[[Fields], Turns]] = {
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "query": _query,
    "completion": _completion,
    "gemini": _gemini,
}
"""What makes the messages of a line, for each shape in which it has none."""
