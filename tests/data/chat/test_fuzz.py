"""Random keys and values in valid lines: each is read, refused in one sentence, or named as unused."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from data.chat.fields import printable
from data.chat.read import FLAGS, Conversation, parse_line
from model import UserError
from tests.harness.random_conversation import RandomConversation

COUNT = 2000
READ = {
    "": (*FLAGS, "messages", "tools", "system", "images", "videos", "audios", "chat_template_kwargs"),
    "messages[].": (
        *("role", "content", "reasoning", "reasoning_content", "thinking", "tool_calls", "tool_responses"),
        *("tool_call_id", "name", "weight", "train"),
    ),
    "messages[].content[].": ("type", "text", "path", "url", "image", "audio", "video", "image_url", "input_audio"),
    "messages[].tool_calls[].": ("id", "type", "function"),
    "messages[].tool_calls[].function.": ("name", "arguments"),
    "messages[].tool_responses[].": ("name", "response"),
    "tools[].": ("type", "function"),
    "tools[].function.": ("name", "description", "parameters", "response"),
}
"""Keys that are read, by their place."""
OTHERS = (
    *("functions", "function_call", "documents", "conversations", "prompt", "completion", "chosen", "refusal"),
    *("annotations", "detail", "index", "strict", "input_schema", "input", "source", "loss", "a.b", "x\ny", "k" * 300),
    *("\ud800", "Role", "WEIGHT", "", "{", "__class__"),
)
WITHOUT_A_TRACE = {
    "id": "compared with the ids of answers",
    "tool_call_id": "compared with the ids of calls",
    "name": "that of the call which is answered",
    "type": "checked",
    "weight": "of a message that is learned anyway, or never",
    "train": "of a message that is learned anyway, or never",
}
"""Keys that are read though the text may stay as it was."""


def objects(line: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Objects of a line with their places."""
    found = [("", line)]
    for tool in line["tools"]:
        found += [("tools[].", tool), *(("tools[].function.", tool[key]) for key in ("function",) if key in tool)]
    for message in line["messages"]:
        found.append(("messages[].", message))
        content = message.get("content")
        found += [("messages[].content[].", part) for part in content] if isinstance(content, list) else []
        for call in message.get("tool_calls") or ():
            found += [("messages[].tool_calls[].", call), ("messages[].tool_calls[].function.", call["function"])]
        found += [("messages[].tool_responses[].", response) for response in message.get("tool_responses") or ()]
    return found


def outcome(line: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """What is learned of a line, and the keys that nothing reads."""
    item = parse_line(json.loads(json.dumps(line)), "chats.jsonl:3")
    assert isinstance(item, Conversation)
    contents = [message["content"] for message in item.messages]
    files = [part.get("path") for content in contents if isinstance(content, list) for part in content]
    return (item.render("small"), item.flags, files), item.unused


def test_a_random_key_is_read_or_refused_or_named() -> None:
    counts = {"read": 0, "named": 0, "without a trace": 0}
    sentences: list[tuple[str, str]] = []
    seed = tried = 0
    while tried < COUNT:
        seed += 1
        made = RandomConversation(random.Random(seed))
        line = {"messages": made.messages(), "tools": made.tools() or [], **made.flags()}
        try:
            before = outcome(line)
        except UserError:
            continue
        for _ in range(4):
            tried += 1
            changed = copy.deepcopy(line)
            found = objects(changed)
            place = made.pick(*dict(found))
            holder = made.pick(*(value for name, value in found if name == place))
            key = made.pick(*READ[place]) if made.chance(0.6) else made.pick(*OTHERS, *READ["messages[]."])
            old, new = holder.get(key), made.pick(made.value(), made.object(), made.content(), 0, 1, "{}", '[{"a": 1}]')
            holder[key] = new
            what = f"seed {seed}: {key[:20]!r} at {place}: {new!r}"
            try:
                learned, unused = outcome(changed)
            except UserError as error:
                sentences.append((str(error), what))
                continue
            if learned != before[0]:
                counts["read"] += 1
            elif any(name.startswith(place + printable(key)) or place.startswith(f"{name}[]") for name in unused):
                counts["named"] += 1
            else:
                empty = not new or new == "{}" or not str(new).strip()
                assert key in WITHOUT_A_TRACE or (key in READ[place] and (new == old or empty)), what
                counts["without a trace"] += 1
    for said, what in sentences:
        assert said.isprintable() and said.endswith(".") and said.startswith("chats.jsonl:3"), what
    assert sum(counts.values()) + len(sentences) == COUNT, counts
    assert min(counts["read"], counts["named"], len(sentences)) > 100 > counts["without a trace"], counts
