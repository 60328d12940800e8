"""Lines whose shape is none, several, or not what it must be: the exact sentence, with the line's own names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data.chat.read import ConversationError, parse_line
from data.chat.shapes import AUTO, LineShape
from tests.harness.chat_files import from_value, model, user

WHERE = "chats.jsonl:7"
FIRST = [user(), model()]
CALLS = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
NO_OBJECTIVE = "from which no objective learns yet"
LAST = 'write it as the last of the line\'s messages, without "chosen" and "rejected".'
REFUSED: list[tuple[str, Any, str, str]] = [
    ("", {}, AUTO, ' has neither a "messages" list nor a "text" string; mend or drop the line.'),
    (
        "",
        {"instruction": "a", "context": "b"},
        AUTO,
        ' has neither a "messages" list nor a "text" string, and fits no other shape (its keys: instruction, context); '
        "name its columns with data.columns, mend or drop the line.",
    ),
    (
        "",
        {"text": "a", "instruction": "b", "input": "", "output": "c"},
        AUTO,
        " can be read as alpaca (instruction, output) and as text (text); set data.shape=alpaca or data.shape=text.",
    ),
    (
        "",
        {"prompt": "a", "completion": "b", "answer": "c"},
        AUTO,
        " can be read as query (prompt, answer) and as completion (prompt, completion); set data.shape=query or "
        "data.shape=completion.",
    ),
    (
        "output=best",
        {"instruction": "a", "best": "b", "prompt": "c"},
        AUTO,
        " can be read as alpaca (instruction, best) and as query (prompt, best); set data.shape=alpaca or "
        "data.shape=query.",
    ),
    (
        "",
        {"conversations": [], "conversation": []},
        AUTO,
        ' has "conversations" and "conversation", two names of one thing; set '
        "data.columns={conversations: conversation} to read the second alone.",
    ),
    (
        "",
        {"query": "a", "question": "b", "answer": "c"},
        AUTO,
        ' has "query" and "question", two names of one thing; set data.columns={query: question} to read the second '
        "alone.",
    ),
    (
        "",
        {"instruction": "a", "response": "b"},
        "alpaca",
        " has no output, which data.shape=alpaca reads (its keys: instruction, response); name its column as "
        "data.columns={output: ...}, mend or drop the line.",
    ),
    (
        "",
        {"prompt": "a"},
        "query",
        " has no response or answer or output, which data.shape=query reads (its keys: prompt); name its column as "
        "data.columns={response: ...}, mend or drop the line.",
    ),
    (
        "output=best",
        {"instruction": "a"},
        AUTO,
        ' has no "best", which data.columns gives as output (its keys: instruction); name another key, mend or drop '
        "the line.",
    ),
    ("", {"text": 3}, "text", ": text must be a string; mend or drop the line."),
    (
        "",
        {"messages": "a"},
        "messages",
        ": messages must be a list of messages, or its JSON as text; mend or drop the line.",
    ),
    (
        "",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        AUTO,
        f" is a preference (chosen, rejected), {NO_OBJECTIVE}; to learn the chosen answer alone, set "
        "data.shape=completion and data.columns={completion: chosen}.",
    ),
    (
        "",
        {"question": "a", "chosen": "b", "rejected": "c"},
        AUTO,
        f" is a preference (chosen, rejected), {NO_OBJECTIVE}; to learn the chosen answer alone, set "
        "data.shape=query and data.columns={answer: chosen}.",
    ),
    (
        "",
        {"prompt": "a", "messages": FIRST, "chosen": FIRST, "rejected": FIRST},
        AUTO,
        f" is a preference (chosen, rejected), {NO_OBJECTIVE}; to learn the chosen answer alone, set "
        "data.shape=messages and data.columns={messages: chosen}.",
    ),
    (
        "",
        {"messages": [user()], "chosen": "b", "rejected": "c"},
        AUTO,
        f" is a preference (chosen, rejected), {NO_OBJECTIVE}; to learn the chosen answer alone, {LAST}",
    ),
    (
        "",
        {"prompt": "a", "completion": "b", "label": False},
        AUTO,
        f" is a preference (completion, label), {NO_OBJECTIVE}; keep the lines whose label is true, without it.",
    ),
    (
        "",
        {"prompt": [], "completion": "b"},
        AUTO,
        ": prompt must be a string beside a string as completion, or a list of messages beside such a list; mend or "
        "drop the line.",
    ),
    (
        "",
        {"prompt": [model(weight=1)], "completion": [model()]},
        AUTO,
        ": prompt[0].weight must be 0, since a prompt is not learned; mend or drop the line.",
    ),
    (
        "",
        {"prompt": [], "completion": from_value("gpt a")},
        AUTO,
        ': completion[0] has "from" and "value", as ShareGPT writes them; rename them to role and content.',
    ),
    (
        "",
        {"messages": from_value("gpt a")},
        AUTO,
        ': messages[0] has "from" and "value", as ShareGPT writes them; rename them to role and content, or set '
        "data.columns={conversations: messages}.",
    ),
    (
        "conversations=chat",
        {"chat": from_value("asistant a")},
        AUTO,
        ": chat[0].from is 'asistant', which is no role; legal: system, developer, user, assistant, model, tool; "
        "nearest: assistant.",
    ),
    (
        "",
        {"conversations": [{"from": "gpt", "role": "user", "value": "a"}]},
        AUTO,
        ': conversations[0] has "from" and "role", two names of one thing; drop one.',
    ),
    (
        "",
        {"conversations": from_value("human a", "gpt ")},
        AUTO,
        ': conversations[1] is an empty answer, which would be learned; give a content, drop it, or set "weight": 0.',
    ),
    (
        "",
        {"conversations": [{"from": "human", "value": 3}]},
        AUTO,
        ": conversations[0].value must be a string or a list of parts; mend or drop the line.",
    ),
    (
        "",
        {"conversations": ["a"]},
        AUTO,
        ": conversations[0] must be an object with from and value; mend or drop the line.",
    ),
    (
        "",
        {"conversations": [{"human": "a"}]},
        AUTO,
        ": conversations[0].assistant must be a string; mend or drop the line.",
    ),
    (
        "",
        {"conversations": from_value("human a", "function_call b")},
        AUTO,
        ': conversations[1].value must be a call {"name": "...", "arguments": {...}}, or its JSON as text; mend or '
        "drop the line.",
    ),
    (
        "",
        {"conversations": from_value("human a", 'function_call {"name": "f", "arguments": [1]}')},
        AUTO,
        ": conversations[1].value.arguments must be an object; mend or drop the line.",
    ),
    (
        "",
        {"conversations": from_value("human a", f"function_call {json.dumps(CALLS)}", "observation b", "gpt c")},
        AUTO,
        ": conversations[1] begins 2 calls, but the answers number 1; give each call its own, in the same order, or "
        "drop the line.",
    ),
    (
        "",
        {"conversations": from_value("human a", "observation b")},
        AUTO,
        ": conversations[1] answers no call and would be lost; give the assistant before it tool_calls, or drop it.",
    ),
    (
        "",
        {"instruction": "a", "output": ""},
        AUTO,
        ': output is an empty answer, which would be learned; give a content, drop it, or set "weight": 0.',
    ),
    ("", {"instruction": "a", "output": 3}, AUTO, ": output must be a string; mend or drop the line."),
    (
        "output=best",
        {"instruction": "a", "best": ["b"]},
        AUTO,
        ": best must be a string; mend or drop the line.",
    ),
    (
        "",
        {"query": "a", "response": "b", "history": [["c"]]},
        AUTO,
        ": history[0] must be a pair of strings; mend or drop the line.",
    ),
    (
        "",
        {"contents": [{"role": "user", "parts": [{"text": "a"}, {"inlineData": {}}]}]},
        AUTO,
        ": contents[0].parts[1].text must be a string; mend or drop the line.",
    ),
    (
        "",
        {"contents": [{"role": "user", "parts": [{"text": "a", "thought": True}]}]},
        AUTO,
        ": contents[0].parts[0].text must be all that a part holds; mend or drop the line.",
    ),
    (
        "",
        {"instruction": "a", "output": "b", "system_prompt": "c"},
        AUTO,
        ': system_prompt would be lost; rename it to "system".',
    ),
]


@pytest.mark.parametrize(("column", "line", "shape", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_each_refusal_says_what_to_do(column: str, line: Any, shape: str, sentence: str) -> None:
    columns = dict([column.split("=")]) if column else {}
    with pytest.raises(ConversationError) as refused:
        parse_line(line, WHERE, LineShape(shape, columns))
    assert str(refused.value) == WHERE + sentence
