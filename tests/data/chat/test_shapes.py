"""Lines of every shape: the same conversation is the same messages, and what fits none or several is refused."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from data.chat.read import Conversation, ConversationError, PlainText, parse_line
from data.chat.shapes import AUTO, COLUMNS, SHAPES, LineShape
from data.corpus.open import Settings, Source, open_data
from data.corpus.prepare import Corpus
from model import ConfigError
from tests.harness.chat_files import TEXT_ONLY, TOKENIZER, from_value, make, model, prepared, text, user, write
from tests.harness.corpus_files import ids_of

WHERE = "chats.jsonl:7"
FIRST = [user(), model()]
SECOND = [*FIRST, user(text("A bird?\nA song?")), model("A film.")]
PLAIN_SECOND = [*FIRST, {"role": "user", "content": "A bird?\nA song?"}, model("A film.")]
CALLS = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
TOOL = {"name": "f", "description": "A cat"}


def called(*calls: dict[str, Any]) -> dict[str, Any]:
    return model("", tool_calls=[{"id": call.get("id"), "function": call["function"]} for call in calls])


def told(name: str, content: str, identity: str | None = None) -> list[dict[str, Any]]:
    call = {"id": identity, "function": {"name": name, "arguments": {"a": 1} if name == "f" else {}}}
    return [call, {"role": "tool", "content": content, "tool_call_id": identity}]


(ONE, T1), (TWO_F, T2), (TWO_G, T3) = told("f", "T"), told("f", "T", "0"), told("g", "U", "1")
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ShareGPT": (
        "sharegpt",
        {"conversations": from_value("human What is it?", "gpt A cat."), "system": "A song", "id": 3},
        {"messages": FIRST, "system": "A song", "id": 3},
    ),
    "other names": (
        "sharegpt",
        {"conversation": [{"role": "User", "content": "What is it?"}, {"role": "bing", "value": "A cat."}]},
        {"messages": FIRST},
    ),
    "a system turn": (
        "sharegpt",
        {"conversations": from_value("system A song", "human What is it?", "chatgpt A cat.")},
        {"messages": [{"role": "system", "content": "A song"}, *FIRST]},
    ),
    "weights and parts": (
        "sharegpt",
        {"conversations": [*FIRST, {"from": "human", "value": [text("A bird?")]}, {"from": "gpt", "value": "B"}]},
        {"messages": [*FIRST, user(text("A bird?")), model("B")]},
    ),
    "not learned": (
        "sharegpt",
        {"conversations": [*from_value("human What is it?"), {"from": "gpt", "value": "A cat.", "weight": 0}, *FIRST]},
        {"messages": [user(), model(weight=0), *FIRST]},
    ),
    "pairs": (
        "sharegpt",
        {
            "conversation": [
                {"human": "What is it?", "assistant": "A cat."},
                {"human": "A bird?\nA song?", "assistant": "A film."},
            ]
        },
        {"messages": PLAIN_SECOND},
    ),
    "as text": (
        "sharegpt",
        {"conversations": json.dumps(from_value("human What is it?", "gpt A cat.")), "tools": json.dumps([TOOL])},
        {"messages": FIRST, "tools": [TOOL]},
    ),
    "messages as text": ("messages", {"messages": json.dumps(FIRST)}, {"messages": FIRST}),
    "a call": (
        "sharegpt",
        {
            "conversations": from_value(
                "human What is it?", f"function_call {json.dumps(CALLS[0])}", "observation T", "gpt A cat."
            ),
            "tools": [TOOL],
        },
        {"messages": [user(), called(ONE), T1, model()], "tools": [TOOL]},
    ),
    "two calls, one after the other": (
        "sharegpt",
        {
            "conversations": [
                *from_value("human What is it?", f"function_call {json.dumps(CALLS[0])}", "observation T"),
                {"from": "tool_call", "value": CALLS[0]},
                *from_value("tool T", "gpt A cat."),
            ]
        },
        {"messages": [user(), called(ONE), T1, called(ONE), T1, model()]},
    ),
    "two calls at once": (
        "sharegpt",
        {
            "conversations": from_value(
                *("human What is it?", *(f"tool_call {json.dumps(call)}" for call in CALLS)),
                *("tool_response T", "tool_response U", "gpt A cat."),
            )
        },
        {"messages": [user(), called(TWO_F, TWO_G), T2, T3, model()]},
    ),
    "two calls in one": (
        "sharegpt",
        {
            "conversations": from_value(
                "human What is it?", f"function_call {json.dumps(CALLS)}", "observation T", "observation U"
            )
        },
        {"messages": [user(), called(TWO_F, TWO_G), T2, T3]},
    ),
    "Alpaca": (
        "alpaca",
        {
            "instruction": "A bird?",
            "input": "A song?",
            "output": "A film.",
            "history": [["What is it?", "A cat."]],
            "system": "A song",
        },
        {"messages": PLAIN_SECOND, "system": "A song"},
    ),
    "no input": (
        "alpaca",
        {"instruction": "What is it?", "input": "", "output": "A cat.", "history": None, "system": None},
        {"messages": FIRST},
    ),
    "input alone": ("alpaca", {"instruction": "", "input": "What is it?", "output": "A cat."}, {"messages": FIRST}),
    "an instruction alone": ("alpaca", {"instruction": "What is it?", "output": "A cat."}, {"messages": FIRST}),
    "query": (
        "query",
        {"query": "A bird?\nA song?", "response": "A film.", "history": '[["What is it?", "A cat."]]'},
        {"messages": PLAIN_SECOND},
    ),
    "prompt": ("query", {"prompt": "What is it?", "output": "A cat.", "answer": None}, {"messages": FIRST}),
    "question": ("query", {"question": "What is it?", "answer": "A cat.", "level": 1}, {"messages": FIRST, "level": 1}),
    "completion": ("completion", {"prompt": "What is it?", "completion": "A cat."}, {"messages": FIRST}),
    "lists of messages": (
        "completion",
        {"prompt": [*FIRST, SECOND[2]], "completion": [SECOND[3]], "tools": [TOOL]},
        {"messages": [user(), model(weight=0), *SECOND[2:]], "tools": [TOOL]},
    ),
    "Gemini": (
        "gemini",
        {
            "systemInstruction": {"parts": [{"text": "A song"}]},
            "contents": [
                {"role": "user", "parts": [{"text": "What is"}, {"text": " it?"}]},
                {"role": "model", "parts": [{"text": "A cat."}]},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "A song"},
                user(text("What is"), text(" it?")),
                {"role": "model", "content": "A cat."},
            ]
        },
    ),
}


def parsed(line: Any, shape: str = AUTO, **columns: str) -> Conversation | PlainText:
    return parse_line(line, WHERE, LineShape(shape, columns))


def read(line: Any, shape: str = AUTO, **columns: str) -> Conversation:
    found = parsed(line, shape, **columns)
    assert isinstance(found, Conversation)
    return found


@pytest.mark.parametrize("name", SAME)
def test_the_same_conversation_is_the_same_messages(name: str) -> None:
    shape, line, plain = SAME[name]
    for asked in (AUTO, shape):
        found, wanted = read(line, asked), read(plain)
        assert (found.messages, found.tools, found.flags) == (wanted.messages, wanted.tools, wanted.flags)
        assert (found.unused, found.shape, wanted.shape) == (wanted.unused, shape, "messages")


def learned(corpus: Corpus) -> list[tuple[list[int], list[list[int]]]]:
    documents = [corpus.shard.document(i) for i in range(corpus.shard.num_documents)]
    return [(ids_of(document), [list(span) for span in document.supervised]) for document in documents]


def test_documents_are_those_of_messages_and_shapes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gemwright")
    made = make(tmp_path, [line for _, line, _ in SAME.values()])
    assert learned(made) == learned(make(tmp_path, [plain for _, _, plain in SAME.values()]))
    assert made.shard.num_documents == len(SAME) == 22
    counts = {"sharegpt": 11, "messages": 1, "alpaca": 4, "query": 3, "completion": 2, "gemini": 1}
    assert made.shard.counts.shapes == counts and str(made.shard.counts) == "ignored keys of lines: id (1), level (1)"
    said = f"{tmp_path / 'chats.jsonl'}: 11 lines of sharegpt, 4 of alpaca, 3 of query, 2 of completion, 1 of gemini"
    assert f"{said}, 1 of messages" in caplog.messages


def test_prompts_are_read_and_not_learned() -> None:
    shape, line, _ = SAME["lists of messages"]
    rendered = read(line).render("small")
    assert [rendered.text[start:end] for start, end in rendered.supervised] == ["A film.<turn|>"]
    assert shape == "completion"


def test_listed_files_and_flags_stand_beside_any_shape() -> None:
    found = read({"instruction": "See <image>", "output": "A cat.", "images": ["a.png"], "enable_thinking": True})
    assert found.messages[0]["content"][1] == {"type": "image", "path": "a.png"}
    assert found.flags == {"enable_thinking": True} and found.unused == ()


def test_columns_are_read_under_other_names() -> None:
    line = {"question": "What is it?", "best": "A cat.", "output": "A bird.", "chat": [user(), model("A song.")]}
    found = read(line, instruction="question", output="best")
    assert found.messages == read({"messages": FIRST}).messages
    assert (found.shape, found.unused) == ("alpaca", ("output", "chat"))
    found = read(line, messages="chat")
    assert found.messages[1]["content"] == "A song." and found.unused == ("question", "best", "output")
    found = read({"messages": from_value("human What is it?", "gpt A cat.")}, conversations="messages")
    assert found.messages == read({"messages": FIRST}).messages and found.unused == ()
    assert parsed(line, "text", text="best") == PlainText(WHERE, "A cat.", ("question", "output", "chat"))
    swapped = read({"input": "What is it?", "instruction": "A cat."}, instruction="input", output="instruction")
    assert swapped.messages == read({"messages": FIRST}).messages and swapped.unused == ()


def test_a_given_shape_is_read_whatever_else_is_there() -> None:
    line = {**SAME["no input"][1], "text": "all", "prompt": "p", "messages": [user(), model("A song.")]}
    assert read(line).unused == ("instruction", "input", "output", "history", "text", "prompt")
    found = read(line, "alpaca")
    assert found.messages == read({"messages": FIRST}).messages
    assert sorted(found.unused) == ["messages", "prompt", "text"]
    assert parsed(line, "text").unused[-1] == "messages"
    chosen = {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A bird."}
    assert read(chosen, "completion", completion="chosen").messages == read({"messages": FIRST}).messages
    assert read(chosen, "query", answer="chosen").messages == read({"messages": FIRST}).messages
    full = {"prompt": "What is it?", "messages": [], "chosen": FIRST, "rejected": FIRST}
    assert read(full, "messages", messages="chosen").messages == read({"messages": FIRST}).messages


def test_shapes_and_columns_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"^shape=alpca does not exist; nearest: alpaca \(all: auto, messages, "):
        LineShape("alpca")
    with pytest.raises(
        ConfigError, match=r"^columns=\{outptu: x\} names nothing that is read; nearest: output \(all: "
    ):
        LineShape(columns={"outptu": "x"})


def test_unused_keys_are_named_as_the_line_has_them() -> None:
    line = {"chat": [{"from": "human", "value": "a", "id": 1}, {"from": "gpt", "value": "b", "loss": 1}], "by": "Ann"}
    assert read(line, conversations="chat", input="by").unused == ("chat[].id", "chat[].loss", "by")


def test_each_source_has_its_own_shape(tmp_path: Path) -> None:
    lines = [{"prompt": "What is it?", "output": "A bird.", "best": "A cat."}]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, lines)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    own = LineShape("completion", {"completion": "best"})
    one = Source(str(tmp_path / "one"), 1, "chat", shape=own)
    settings = Settings(TEXT_ONLY, 64, 3, tmp_path / "tokenizer.json", cache=tmp_path / "cache")
    first, second = open_data([one, Source(str(tmp_path / "two"), 1, "chat")], settings).datasets
    texts = [
        TOKENIZER.decode(ids, skip_special_tokens=False) for ((ids, _),) in map(learned, (first.corpus, second.corpus))
    ]
    assert [said.partition("model\n")[2] for said in texts] == ["A cat.<turn|>\n", "A bird.<turn|>\n"]
    assert [dataset.shard.counts.shapes for dataset in (first, second)] == [{"completion": 1}, {"query": 1}]
    folder = prepared(tmp_path, TEXT_ONLY, tmp_path / "two").folder
    assert prepared(tmp_path, TEXT_ONLY, tmp_path / "two", shape=own).folder != folder


def test_random_lines_are_read_or_refused() -> None:
    draw = random.Random(0)
    keys = (*COLUMNS, *COLUMNS, "chosen", "rejected", "enable_thinking", "id", "k\n", "\ud800")
    inner = ("from", "value", "role", "content", "human", "assistant", "parts", "text", "tool_calls", "weight", "name")
    texts = ("", "a", "user", "gpt", "function_call", "observation", "[]", '[{"from": "gpt", "value": "a"}]', "{", "[[")

    def value(depth: int = 0) -> Any:
        kind = draw.random()
        if depth > 3 or kind < 0.5:
            return draw.choice((None, True, 0, 1, 2.5, *texts, *texts))
        if kind < 0.75:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        return {draw.choice(inner): value(depth + 1) for _ in range(draw.randrange(4))}

    read, refused = set(), 0
    for number in range(10_000):
        line = {draw.choice(keys): value() for _ in range(draw.randrange(1, 4))}
        if draw.random() < 0.5:
            whole = draw.choice([*SAME.values()])[1]
            line = {**whole, draw.choice([*whole, *line]): value()}
        columns = {draw.choice(COLUMNS): draw.choice([*line]) for _ in range(draw.choice((0, 0, 0, 1)))}
        shape = LineShape(draw.choice((AUTO, AUTO, *SHAPES)), columns)
        try:
            read.add((number, parse_line(line, WHERE, shape).shape))
        except ConversationError as error:
            said, refused = str(error), refused + 1
            fine = said.startswith(WHERE) and said.isprintable() and said.endswith(".") and len(said) < 500
            assert fine, f"{number}: {line} {shape}: {said!r}"
    kinds = [shape for _, shape in read]
    assert {shape: kinds.count(shape) for shape in SHAPES if kinds.count(shape) < 20} == {}, "each is read now and then"
    assert refused > 1000
