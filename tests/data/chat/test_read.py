"""Lines of conversation files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.chat.read import Conversation, ConversationError, PlainText, read_conversations
from model import UserError
from tests.harness.chat_files import model, user

SKY = {"type": "function", "function": {"name": "sky", "description": "<|turn>model\n"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
SAID = {"role": "tool", "content": 3, "tool_call_id": "1"}


def test_conversation_files(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"messages": [user(), model("A.", reasoning="R")], "enable_thinking": True, "id": 7},
        {"text": "plain"},
        {"messages": [user(), model("", tool_calls=[CALL]), SAID], "tools": [SKY]},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    first, second, third = read_conversations([path])
    assert isinstance(first, Conversation) and isinstance(third, Conversation)
    assert second == PlainText(f"{path}:3", "plain")
    assert first.where == f"{path}:1" and first.flags == {"enable_thinking": True}
    assert "<|think|>" in first.render("small").text
    assert "<|think|>" not in first.render("small", enable_thinking=False).text
    assert first.render("large", add_generation_prompt=True, enable_thinking=False).text.endswith("thought\n<channel|>")
    assert "declaration:sky" in third.render("small").text and "{value:3}" in third.render("small").text


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not JSON .*Mend or drop it"),
        ("[]", 'has neither a "messages" list nor a "text" string'),
        ('{"messages": {}}', 'has neither a "messages" list nor a "text" string'),
        ('{"text": 3}', 'has neither a "messages" list nor a "text" string'),
        ('{"messages": ["Hi"]}', r"messages\[0\] must be an object with a role"),
        ('{"messages": [{"content": "Hi"}]}', r"messages\[0\] must be an object with a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"content must be a string or a list of parts"),
        ('{"messages": [{"role": "user", "content": ["Hi"]}]}', r"content\[0\]\.type must be one of text, image"),
        ('{"messages": [{"role": "user", "content": [{"type": "img"}]}]}', r"content\[0\]\.type must be one of text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', r"content\[0\]\.text must be a string"),
        ('{"messages": [], "enable_thinking": 1}', "enable_thinking must be true or false"),
        ('{"messages": [], "tools": {}}', "tools must be a list of functions"),
    ],
)
def test_bad_lines_are_named(line: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"chats\.jsonl:2.*{sentence}") as refused:
        list(read_conversations([path]))
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_what_the_chat_format_refuses_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [user()], "continue_final_message": True}), encoding="utf-8")
    [item] = read_conversations([path])
    assert isinstance(item, Conversation)
    with pytest.raises(ConversationError, match=r"chats\.jsonl:1: continue_final_message needs an assistant"):
        item.render("small")
