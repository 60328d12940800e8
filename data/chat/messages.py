"""Messages of a line as `data.chat.render.render` reads them, checked, and without what nothing reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.chat.fields import ConversationError, Fields, check_value, parse_text
from data.chat.foreign import check_role, refuse_in_call, refuse_in_message, refuse_in_tool
from data.chat.parts import MODEL, read_content, says_something
from data.chat.tools import unread_keys

SYSTEM = ("system", "developer")
_THOUGHTS = ("reasoning", "reasoning_content", "thinking")
_SCHEMA = "a JSON schema"
_CALL = 'an object {"function": {"name": "...", "arguments": {...}}}'


def read_messages(line: Fields, found: Sequence[Any], keep_thoughts: bool) -> list[dict[str, Any]]:
    """Messages in the form that `render` reads; `keep_thoughts` is its `preserve_thinking`.

    Raises `ConversationError` for what cannot be written, or would be lost or learned against its meaning.
    """
    messages: list[dict[str, Any]] = []
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in found]
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    caller: dict[str, Any] = {}
    for i, value in enumerate(found):
        fields = line.inside(value, f"messages[{i}]", "an object with a role")
        role = check_role(fields)
        message = {"role": role, "content": read_content(fields, role)}
        if role == "tool":
            message |= _answer(fields, caller)
        elif i or role not in SYSTEM:
            message |= _calls(fields)
            message |= _thought(fields, i > last_user or (keep_thoughts and "tool_calls" in message))
        message |= _weight(fields, role)
        refuse_in_message(fields)
        _check_content(fields, message, roles[i + 1] if i + 1 < len(roles) else None)
        fields.close()
        caller = caller if role == "tool" else message
        messages.append(message)
    return messages


def read_tools(line: Fields) -> list[dict[str, Any]] | None:
    """Declared functions in the form that `render` reads. Raises `ConversationError` for what is none."""
    tools: list[dict[str, Any]] = []
    for i, value in enumerate(line.take_list("tools", "a list of functions")):
        tool = line.inside(value, f"tools[{i}]", "an object with a function")
        fields = _function(tool, "a tool")
        refuse_in_tool(fields)
        function = {key: item for key, item in fields.found.items() if key not in fields.taken}
        fields.check(isinstance(function.get("name"), str), "name", "a string")
        for key in ("parameters", "response"):
            schema = function.get(key)
            if schema and isinstance(schema, str):
                schema = function[key] = parse_text(schema, fields.at(key), _SCHEMA)
            fields.check(schema in (None, "") or isinstance(schema, Mapping), key, _SCHEMA)
        check_value(function, fields.where)
        for key in unread_keys(function):
            fields.drop(key)
        tools.append({"type": "function", "function": function})
    return tools or None


def _function(holder: Fields, what: str) -> Fields:
    """The function of a tool or a call: under "function", or bare."""
    holder.check(holder.take("type") in (None, "function"), "type", f"function, the only kind of {what}")
    value = holder.take("function")
    if value is None and "name" in holder.found:
        return holder
    function = holder.inside(value, "function", "an object with a name")
    holder.close()
    return function


def _calls(message: Fields) -> dict[str, Any]:
    """Calls and what they returned, where there are some."""
    calls, responses = [], []
    for i, value in enumerate(message.take_list("tool_calls", "a list of calls")):
        call = message.inside(value, f"tool_calls[{i}]", _CALL)
        identity = call.take("id")
        fields = _function(call, "a call")
        refuse_in_call(fields)
        name, arguments = fields.take("name"), fields.take("arguments")
        fields.check(isinstance(name, str), "name", "a string")
        if isinstance(arguments, str):
            arguments = parse_text(arguments, fields.at("arguments"), "an object")
        fields.check(arguments is None or isinstance(arguments, Mapping), "arguments", "an object")
        check_value(arguments, fields.at("arguments"))
        fields.close()
        calls.append({"id": identity, "function": {"name": name, "arguments": arguments or {}}})
    for i, value in enumerate(message.take_list("tool_responses", "a list of what tools returned")):
        fields = message.inside(value, f"tool_responses[{i}]", "an object with a name and a response")
        response = {key: fields.take(key) for key in ("name", "response") if key in fields.found}
        fields.check(isinstance(response.get("name"), str | None), "name", "a string")
        check_value(response, fields.at("response"))
        fields.close()
        responses.append(response)
    return {key: found for key, found in (("tool_calls", calls), ("tool_responses", responses)) if found}


def _answer(message: Fields, caller: Mapping[str, Any]) -> dict[str, Any]:
    """Which call a tool message answers. Raises `ConversationError` for one that answers none and would be lost."""
    identity, name = message.take("tool_call_id"), message.take("name")
    calls = caller.get("tool_calls", ())
    if not calls or "tool_responses" in caller:
        raise ConversationError(
            f"{message.where} answers no call and would be lost; give the assistant before it tool_calls, or drop it."
        )
    message.check(isinstance(name, str | None), "name", "a string")
    called = [call["function"]["name"] for call in calls if call["id"] == identity]
    if called and name and name != called[-1]:
        message.drop("name")
    return {"tool_call_id": identity, "name": name}


def _thought(message: Fields, written: bool) -> dict[str, Any]:
    """The thought of a message; other spellings, and one that the chat format leaves out, are unused."""
    found = {key: message.take(key) for key in _THOUGHTS}
    for key, value in found.items():
        message.check(isinstance(value, str | None), key, "a string")
    content = found["reasoning_content"]
    thought = found["reasoning"] or (found["thinking"] if content is None else content)
    for key, value in found.items():
        if value and value != thought:
            message.drop(key)
        elif value and not written:
            message.drop(f"{key} before the last user message")
    return {"reasoning": thought} if thought else {}


def _weight(message: Fields, role: str) -> dict[str, Any]:
    """Whether the message is learned, where it says so."""
    weight, train = message.take("weight"), message.take("train")
    legal = weight is None or (isinstance(weight, int | float) and not isinstance(weight, bool) and weight in (0, 1))
    message.check(legal, "weight", "0 or 1")
    message.check(isinstance(train, bool | None), "train", "true or false")
    wanted = {bool(value) for value in (weight, train) if value is not None}
    if len(wanted) > 1:
        raise ConversationError(f"{message.where} has a weight and a train that differ; leave one out.")
    if True in wanted and role not in MODEL:
        raise ConversationError(
            f'{message.where} asks that role {role} be learned, and only an assistant can be; set "weight": 0.'
        )
    return {"weight": 0} if False in wanted else {}


def _check_content(fields: Fields, message: Mapping[str, Any], following: str | None) -> None:
    """Raises `ConversationError` for a message without content, and for an answer of nothing that would be learned."""
    if message["role"] == "tool" or "tool_calls" in message or "tool_responses" in message:
        return
    content = message["content"]
    fields.check(content is not None, "content", "a string or a list of parts")
    learned = message["role"] in MODEL and message.get("weight") != 0
    if learned and following != "assistant" and not says_something(content):
        raise ConversationError(
            f'{fields.where} is an empty answer, which would be learned; give a content, drop it, or set "weight": 0.'
        )
