"""Roles and keys that others write: what each role means here, and what to write instead of a key that is not read."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from data.chat.fields import ConversationError, Fields, shown

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
_OTHER_ROLES = {
    "human": "user",
    "person": "user",
    "customer": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "agent": "assistant",
    "ai": "assistant",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
    "instruction": "system",
}
_PART = 'make it a part of the content, as {"type": "image", "path": "cat.png"}'
_IN_MESSAGES = {
    "function_call": 'write it as "tool_calls": [{"function": {"name": ..., "arguments": ...}}]',
    "refusal": "make it the content",
    "tools": 'move it to the line, beside "messages"',
    "functions": 'write them as "tools" of the line',
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _PART),
}
_IN_LINES = {
    "functions": 'write them as "tools": [{"type": "function", "function": {"name": ...}}]',
    "function_call": 'write it as "tool_calls" of the message that calls',
    "documents": "the chat format has no place for them; write them into a user message",
    "system_prompt": 'rename it to "system"',
    "system_message": 'rename it to "system"',
    "image": 'write "images": ["cat.png"], and <image> in the text where it is to be seen',
    "video": 'write "videos": ["film.mp4"], and <video> in the text where it is to be seen',
    "audio": 'write "audios": ["song.wav"], and <audio> in the text where it is to be heard',
}
_IN_CALLS = {"input": 'rename it to "arguments"', "parameters": 'rename it to "arguments"'}
_IN_TOOLS = {"input_schema": 'rename it to "parameters"'}
_WITH_MESSAGES = ("system", "tools", "functions", "images", "videos", "audios", "image", "video", "audio")


def role_of(name: Any) -> Any:
    """The role that is meant by a name of another shape; any other value as it is."""
    known = name.lower() if isinstance(name, str) else ""
    return known if known in ROLES else _OTHER_ROLES.get(known, name)


def refuse_in_line(line: Fields) -> None:
    """Raises `ConversationError` for a key of a line with messages whose loss would change what is learned."""
    _refuse(line, _IN_LINES)


def refuse_in_text(line: Fields) -> None:
    """Raises `ConversationError` for a key that means something beside messages alone."""
    _refuse(line, dict.fromkeys(_WITH_MESSAGES, 'it is read beside "messages" and not beside "text"; write those'))


def refuse_in_message(message: Fields) -> None:
    """Raises `ConversationError` for a key of a message whose loss would change what is learned."""
    _refuse(message, _IN_MESSAGES)


def refuse_in_call(function: Fields) -> None:
    """Raises `ConversationError` for arguments of a call under a name that is not read."""
    _refuse(function, _IN_CALLS)


def refuse_in_tool(function: Fields) -> None:
    """Raises `ConversationError` for a schema of a tool under a name that is not read."""
    _refuse(function, _IN_TOOLS)


def check_role(message: Fields) -> str:
    """The role of a message. Raises `ConversationError` for one that the chat format does not know."""
    role = message.take("role")
    if not isinstance(role, str):
        if "from" in message.found:
            raise ConversationError(
                f'{message.where} has "from" and "value", as ShareGPT writes them; rename them to role and content'
                + (", or set data.columns={conversations: messages}." if not message.places else ".")
            )
        raise ConversationError(f"{message.where} must be an object with a role; mend or drop the line.")
    if role not in ROLES:
        known = get_close_matches(role.lower(), ROLES, 1)
        nearest = _OTHER_ROLES.get(role.lower()) or (known[0] if known else "")
        raise ConversationError(
            f"{message.at('role')} is {shown(role)}, which is no role; legal: {', '.join(ROLES)}"
            + (f"; nearest: {nearest}." if nearest else ".")
        )
    return role


def _refuse(fields: Fields, keys: dict[str, str]) -> None:
    for key, value in fields.found.items():
        if value and key in keys:
            raise ConversationError(f"{fields.at(key)} would be lost; {keys[key]}.")
