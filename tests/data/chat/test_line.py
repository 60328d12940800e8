"""What the keys of a line mean: read, refused because their loss would change what is learned, or named as unused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data.chat.encode import encode
from data.chat.read import Conversation, ConversationError, PlainText, parse_line
from tests.harness.chat_files import TOKENIZER, model, text, user

CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
OUTPUT = {"role": "tool", "content": "T"}
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
HELLO = [user(), model()]


def read(messages: Any = HELLO, **line: Any) -> Conversation:
    found = parse_line(json.loads(json.dumps({"messages": messages, **line})), "chats.jsonl:7")
    assert isinstance(found, Conversation)
    return found


def written(messages: Any = HELLO, **line: Any) -> str:
    found = read(messages, **line)
    assert found.unused == ()
    return found.render("small").text


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "system": ({"system": "S"}, {"messages": [{"role": "system", "content": "S"}, *HELLO]}),
    "no system": ({"system": ""}, {}),
    "template flags": ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
    "flags that agree": (
        {"chat_template_kwargs": {"enable_thinking": True, "preserve_thinking": None}, "enable_thinking": True},
        {"enable_thinking": True},
    ),
    "null flag": ({"enable_thinking": None, "chat_template_kwargs": None, "tools": None, "text": None}, {}),
    "tools as text": ({"tools": json.dumps([TOOL])}, {"tools": [TOOL]}),
    "bare tool": ({"tools": [TOOL["function"]]}, {"tools": [TOOL]}),
    "schema as text": (
        {"tools": [{"type": "function", "function": {**TOOL["function"], "parameters": json.dumps(SCHEMA)}}]},
        {"tools": [TOOL]},
    ),
    "no tools": ({"tools": ""}, {}),
    "arguments as text": (
        {"messages": [user(), model(None, tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}]), OUTPUT]},
        {"messages": [user(), model("", tool_calls=[CALL]), OUTPUT]},
    ),
    "bare call": (
        {"messages": [user(), model(tool_calls=[{"type": "function", "name": "f", "arguments": {"a": 1}}])]},
        {"messages": [user(), model(tool_calls=[CALL])]},
    ),
    "calls as text": (
        {"messages": [user(), model(tool_calls=json.dumps([CALL]))]},
        {"messages": [user(), model(tool_calls=[CALL])]},
    ),
    "nulls of a table": (
        {"messages": [{**user(text("a")), "tool_calls": None, "weight": None}, model(reasoning=None, train=True)]},
        {"messages": [user(text("a")), model()]},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_other_spellings_are_written_alike(name: str) -> None:
    line, plain = SAME[name]
    assert written(**line) == written(**plain)


@pytest.mark.parametrize(
    "unlearned", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False, "reasoning": "R"}]
)
def test_an_answer_of_no_weight_is_written_and_not_learned(unlearned: dict[str, Any]) -> None:
    tools = [user(), model("", tool_calls=[CALL], **unlearned), OUTPUT, model("A bird.", weight=1)]
    for messages, learned in (
        ([user(), model(**unlearned), user(), model("A bird.", train=True)], "A bird.<turn|>"),
        (tools, "A bird.<turn|>"),
        ([user(), model("", weight=0), {**user(), "weight": 0}, model()], "A cat.<turn|>"),
    ):
        found = read(messages).render("small")
        plain = [{key: value for key, value in message.items() if key not in unlearned} for message in messages]
        if "reasoning" not in unlearned and messages[1].get("content", "") != "":
            assert found.text == read(plain).render("small").text
        encoded = encode(found, TOKENIZER)
        kept = [token for token, supervised in zip(encoded.ids, encoded.supervised, strict=True) if supervised]
        assert TOKENIZER.decode(kept, skip_special_tokens=False) == learned
    assert not read([user(), model(**unlearned)]).render("small").supervised


def test_listed_files_take_the_places_of_their_markers() -> None:
    image, film, song = (
        {"type": kind, "path": path} for kind, path in (("image", "a.png"), ("video", "f.mp4"), ("audio", "s.wav"))
    )
    messages = [
        user(text("See <image>\nand <video> then"), {"type": "image"}, {"type": "image", "path": "own.png"}),
        model("<image> I hear"),
        {"role": "user", "content": "<audio><html>"},
        model(),
    ]
    found = read(
        messages, images=["a.png", {"path": "b.png", "bytes": None}, "c.png"], videos=["f.mp4"], audios=["s.wav"]
    )
    b, c, own = ({"type": "image", "path": path} for path in ("b.png", "c.png", "own.png"))
    by_hand = [
        user(text("See "), image, text("\nand "), film, text(" then"), b, own),
        model([c, text(" I hear")]),
        user(song, text("<html>")),
        model(),
    ]
    paths = [part["path"] for message in found.messages for part in message["content"] if "path" in part]
    assert paths == ["a.png", "f.mp4", "b.png", "own.png", "c.png", "s.wav"] and found.unused == ()
    assert found.render("small") == read(by_hand).render("small")
    plain = [user(text("<image> <video>")), model()]
    assert "<image> <video>" in written(plain, images=None), "a text, where nothing is listed"


UNUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "of the line": ({"id": 3, "weight": 0, "text": "t", "a\nb": None}, ["id", "weight", "text", "'a\\nb'"]),
    "long": ({"k" * 999: 1}, [f"'{'k' * 56}..."]),
    "of flags": ({"chat_template_kwargs": {"date": "today"}}, ["chat_template_kwargs.date"]),
    "of messages": (
        {"messages": [{**user(), "name": "Ann"}, {**model(), "refusal": None, "annotations": []}]},
        ["messages[].name", "messages[].refusal", "messages[].annotations"],
    ),
    "of parts": (
        {"messages": [user({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}, "cache": 1})]},
        ["messages[].content[].image_url.detail", "messages[].content[].cache"],
    ),
    "of calls": (
        {"messages": [user(), model(tool_calls=[{**CALL, "index": 0}]), {**OUTPUT, "name": "g", "ok": True}]},
        ["messages[].tool_calls[].index", "messages[].name", "messages[].ok"],
    ),
    "of responses": (
        {"messages": [user(), model(tool_responses=[{"name": "f", "response": 1, "ms": 5}])]},
        ["messages[].tool_responses[].ms"],
    ),
    "of thoughts": (
        {"messages": [user(), model(thinking="R"), user(), model(reasoning="Q", thinking="P")]},
        ["messages[].thinking before the last user message", "messages[].thinking"],
    ),
    "of thoughts in content": (
        {"messages": [user(), model("<|channel>thought\nq<channel|>A.")]},
        ["messages[].content between channel tokens"],
    ),
    "of tools": (
        {
            "tools": [
                {
                    "type": "function",
                    "cache": 1,
                    "function": {
                        "name": "f",
                        "strict": True,
                        "parameters": {
                            "$schema": "x",
                            "properties": {
                                "a": {"type": "integer", "enum": [1], "default": 1},
                                "b": {"type": "array", "items": {"properties": {"c": {"title": "t"}}, "minItems": 1}},
                                "d": {"type": "object", "properties": {"e": {"type": "string", "enum": ["x"]}}},
                                "g": {"type": "object", "anything": {"description": "read as a property"}},
                                "h": "string",
                            },
                        },
                    },
                }
            ]
        },
        [
            "tools[].cache",
            "tools[].function.strict",
            "tools[].function.parameters.$schema",
            "tools[].function.parameters.properties[].enum",
            "tools[].function.parameters.properties[].default",
            "tools[].function.parameters.properties[].title",
            "tools[].function.parameters.properties[]",
        ],
    ),
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_nothing_reads_is_named_once(name: str) -> None:
    line, unused = UNUSED[name]
    assert list(read(**line).unused) == unused


def test_a_plain_text_names_what_nothing_reads() -> None:
    found = parse_line({"id": 1, "text": "a", "enable_thinking": True, "messages": None}, "a.jsonl:1")
    assert found == PlainText("a.jsonl:1", "a", ("id", "enable_thinking"))


def message(**keys: Any) -> dict[str, Any]:
    return {"messages": [user(), {**model(), **keys}]}


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": [value]}
    return value


def arguments(value: Any) -> dict[str, Any]:
    return message(tool_calls=[{"function": {"name": "f", "arguments": value}}])


ARGUMENTS = r"messages\[1\]\.tool_calls\[0\]\.function\.arguments must be "
REFUSED: list[tuple[Any, str]] = [
    ({"messages": [{"role": "system", "content": "S"}], "system": "T"}, '"system" and a first message of that role'),
    ({"messages": HELLO, "system": ["T"]}, "system must be a string"),
    ({"messages": HELLO, "system_prompt": "T"}, 'system_prompt would be lost; rename it to "system"'),
    ({"messages": HELLO, "documents": ["T"]}, "documents would be lost; .* user message"),
    ({"messages": HELLO, "functions": [{"name": "f"}]}, 'functions would be lost; write them as "tools"'),
    ({"messages": HELLO, "function_call": "auto"}, 'function_call would be lost; write it as "tool_calls"'),
    ({"messages": HELLO, "image": "a.png"}, 'image would be lost; write "images"'),
    (
        {"messages": HELLO, "images": ["a.png"]},
        "images has length 1, and the messages have 0 places for it; write <image>",
    ),
    (
        {"messages": [user(text("<image>"))], "images": ["a.png"] * 2},
        "images has length 2, and the messages have 1 places",
    ),
    ({"messages": [user(text("<audio>"))], "audios": []}, "audios has length 0, and the messages have 1 places"),
    ({"messages": HELLO, "images": "a.png"}, "images must be a list of paths"),
    ({"messages": HELLO, "images": [{"bytes": "AA"}]}, r"images\[0\] must be the path of a file"),
    ({"messages": HELLO, "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object with flags"),
    ({"messages": HELLO, "chat_template_kwargs": {"enable_thinking": "yes"}}, r"kwargs\.enable_thinking must be true"),
    (
        {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
        "enable_thinking is true, and the line says otherwise",
    ),
    ({"messages": HELLO, "tools": "[{"}, "tools must be a list of functions, or its JSON as text"),
    ({"messages": HELLO, "tools": [{"type": "web_search"}]}, r"tools\[0\]\.type must be function, the only kind"),
    ({"messages": HELLO, "tools": [{"function": {}}]}, r"tools\[0\]\.function\.name must be a string"),
    ({"messages": HELLO, "tools": [{"name": "f", "input_schema": {"a": 1}}]}, "input_schema would be lost; rename"),
    ({"messages": HELLO, "tools": [{"name": "f", "parameters": "x"}]}, r"tools\[0\]\.parameters must be a JSON schema"),
    ({"messages": HELLO, "tools": [{"name": "f", "parameters": deep(60)}]}, "more than 100 levels"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference .* no objective learns yet"),
    ({"text": "a", "images": ["a.png"]}, 'images would be lost; it is read beside "messages" and not beside "text"'),
    ({"text": "a", "tools": [TOOL]}, "tools would be lost"),
    ({"messages": [{"from": "human", "value": "x"}]}, r'messages\[0\] has "from" and "value", as ShareGPT'),
    (message(role="human"), r"messages\[1\]\.role is 'human', which is no role; legal: system, .*; nearest: user\."),
    (message(role="gpt"), "nearest: assistant"),
    (message(role="function"), "nearest: tool"),
    (message(role="Assistant"), "nearest: assistant"),
    (message(role="x\n" * 99), r"role is 'x\\nx\\n.*\.\.\., which is no role; legal: .* tool\."),
    (message(content=None), r"messages\[1\]\.content must be a string or a list of parts"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content must be a string or a list of parts"),
    (message(content=""), r"messages\[1\] is an empty answer, which would be learned"),
    (message(content=[text(" "), text("<|channel>q<channel|>")], reasoning="R"), "is an empty answer"),
    (message(weight=0.5), r"messages\[1\]\.weight must be 0 or 1"),
    (message(weight=True), "weight must be 0 or 1"),
    (message(train=1), "train must be true or false"),
    (message(weight=0, train=True), "a weight and a train that differ"),
    ({"messages": [{**user(), "weight": 1}]}, r"messages\[0\] asks that role user be learned"),
    (message(function_call={"name": "f"}), r'messages\[1\]\.function_call would be lost; write it as "tool_calls"'),
    (message(tools=[TOOL]), r'messages\[1\]\.tools would be lost; move it to the line, beside "messages"'),
    (message(refusal="No."), "refusal would be lost; make it the content"),
    (message(images=["a.png"]), "images would be lost; make it a part of the content"),
    (message(reasoning=["R"]), r"messages\[1\]\.reasoning must be a string"),
    ({"messages": [OUTPUT, *HELLO]}, r"messages\[0\] answers no call and would be lost"),
    ({"messages": [user(), model(tool_calls=[CALL], tool_responses=[{}]), OUTPUT]}, "answers no call"),
    (message(tool_calls=5), "tool_calls must be a list of calls"),
    (message(tool_calls=[{"type": "custom", "function": {}}]), r"tool_calls\[0\]\.type must be function"),
    (message(tool_calls=[{"id": "1"}]), r"tool_calls\[0\]\.function must be an object with a name"),
    (message(tool_calls=[{"name": "f", "input": {"a": 1}}]), 'input would be lost; rename it to "arguments"'),
    (message(tool_responses=[3]), r"tool_responses\[0\] must be an object with a name"),
    (arguments("[1]"), ARGUMENTS + "an object"),
    (arguments('{"a": 1'), ARGUMENTS + "an object, or its JSON as text"),
    (arguments('{"a": 1, "a": 2}'), ARGUMENTS + "JSON in which no object has a key twice"),
    (arguments("[" * 1_000_000), ARGUMENTS + "an object, or its JSON as text"),
    (arguments(f'{{"a": {"9" * 5000}}}'), ARGUMENTS + "an object, or its JSON as text"),
    (arguments({"a": 10**1500}), ARGUMENTS + "without numbers of more than 1000 digits"),
    (arguments('{"a": NaN}'), ARGUMENTS + "without nan"),
    (arguments({"a": [float("inf")]}), ARGUMENTS + "without inf"),
    (arguments({"a\ud800": 1}), ARGUMENTS + "without half a surrogate pair"),
    (arguments(deep(400)), "arguments has lists or objects of more than 100 levels"),
    ({"messages": [user({"type": "text", "text": "a", "image": "a.png"})]}, 'has the type text and "image" too'),
    ({"messages": [user({"type": "image", "path": "a.png", "text": "a"})]}, 'has the type image and "text" too'),
    ({"messages": [user({"type": "image", "path": "a.png", "url": "b.png"})]}, "must be one file; it names several"),
    ({"messages": [user({"type": 10**5000})]}, r"messages\[0\]\.content\[0\]\.type must be one of text, image"),
    ({"messages": [user({"type": "image", "path": 3})]}, r"content\[0\]\.path must be the path of a file"),
]


@pytest.mark.parametrize(("line", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_what_would_be_lost_or_learned_amiss_is_refused_with_its_line(line: Any, sentence: str) -> None:
    with pytest.raises(ConversationError, match=rf"^chats\.jsonl:7:? .*{sentence}") as refused:
        parse_line(line, "chats.jsonl:7")
    said = str(refused.value)
    assert said.isprintable() and said.endswith(".") and len(said) < 400
