"""Chat text and spans: the golden cases, our Jinja template, and the two against each other."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from data.chat.encode import encode
from data.chat.render import ChatError, render
from data.chat.template import chat_template
from data.tokenizer import train_tokenizer
from tests.harness.random_conversation import RandomConversation

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
JULY = [case for case in GOLDEN if case["revision"] == "2026-07-09"]
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Part:
    kind: str
    placeholder: str


USER = {"role": "user", "content": "Go"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
ASKS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
OUTPUT = {"role": "tool", "content": " T ", "tool_call_id": "1"}
ASKED = "<|turn>model\n<|tool_call>call:f{}<tool_call|><|tool_response>"
ANSWERED = ASKED + 'response:f{value:<|"|> T <|"|>}<tool_response|>'
GO = "<|turn>user\nGo<turn|>\n"


def names(cases: list[dict[str, Any]]) -> list[str]:
    return [case["name"] for case in cases]


def with_jinja(messages: Any, tools: Any, size: str, **flags: Any) -> tuple[str, Spans]:
    """What transformers makes of our template."""
    made: Any = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=chat_template(size),
        return_assistant_tokens_mask=True,
        bos_token="<bos>",
        **flags,
    )
    texts, indices = made
    spans: Spans = []
    for start, end in indices[0]:
        end = min(end, len(texts[0]))  # a partial answer is cut after the spans are taken
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        if start < end:
            spans.append((start, end))
    return texts[0], spans


@pytest.mark.parametrize("case", GOLDEN, ids=names(GOLDEN))
def test_golden_cases(case: dict[str, Any]) -> None:
    def run() -> Any:
        flags = {**case["kwargs"], "revision": case["revision"]}
        return render(case["messages"], tools=case["tools"], size=case["template"], **flags)

    if case["rendered"] is None:
        with pytest.raises(ChatError):
            run()
        return
    rendered = run()
    assert rendered.text == case["rendered"]
    assert rendered.supervised == [tuple(span) for span in case["supervised"]]


@pytest.mark.parametrize("case", JULY, ids=names(JULY))
def test_golden_cases_through_the_jinja_template(case: dict[str, Any]) -> None:
    if case["rendered"] is None:
        with pytest.raises(Exception, match="give"):
            with_jinja(case["messages"], case["tools"], case["template"], **case["kwargs"])
        return
    text, spans = with_jinja(case["messages"], case["tools"], case["template"], **case["kwargs"])
    assert text == case["rendered"]
    assert spans == [tuple(span) for span in case["supervised"]]


def answer(content: Any = "A", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


RULES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "nothing": ([], {}, ""),
    "nothing_but_a_prompt": ([], {"add_generation_prompt": True}, "<|turn>model\n"),
    "later_system_is_a_turn": ([USER, {"role": "system", "content": " S "}], {}, GO + "<|turn>system\nS<turn|>\n"),
    "system_after_a_lost_tool": (
        [OUTPUT, {"role": "system", "content": [text_part("S")]}],
        {},
        "<|turn>system\nS<turn|>\n",
    ),
    "system_parts_lose_media": (
        [
            {
                "role": "system",
                "content": [text_part("a"), {"type": "image"}, text_part("b")],
            }
        ],
        {},
        "<|turn>system\na  b <turn|>\n",
    ),
    "tool_without_a_call_is_lost": ([USER, OUTPUT, answer()], {}, GO + "<|turn>model\nA<turn|>\n"),
    "open_call_before_a_user": ([USER, ASKS, USER], {}, GO + ASKED + GO),
    "open_call_before_an_assistant": ([USER, ASKS, answer()], {}, GO + ASKED + "A<turn|>\n"),
    "open_call_needs_no_prompt": ([USER, ASKS], {"add_generation_prompt": True}, GO + ASKED),
    "answered_call_stays_open": ([USER, ASKS, OUTPUT], {"add_generation_prompt": True}, GO + ANSWERED),
    "answered_call_before_a_user": ([USER, ASKS, OUTPUT, USER], {}, GO + ANSWERED + "<turn|>\n" + GO),
    "answered_call_with_content_last": (
        [USER, {**ASKS, "content": "A"}, OUTPUT],
        {"add_generation_prompt": True},
        GO + ANSWERED + "A<turn|>\n",
    ),
    "answered_call_with_content_goes_on": (
        [USER, {**ASKS, "content": "A"}, OUTPUT, answer("B")],
        {},
        GO + ANSWERED + "AB<turn|>\n",
    ),
    "output_of_another_call": (
        [USER, ASKS, {**OUTPUT, "tool_call_id": "2"}],
        {},
        GO + ANSWERED.replace("response:f", "response:unknown"),
    ),
    "output_with_media": (
        [USER, ASKS, {**OUTPUT, "content": [{"type": "image"}, text_part(" T "), {"type": "audio"}]}],
        {},
        GO + ANSWERED + "<|image|><|audio|>",
    ),
    "output_null": (
        [USER, ASKS, {**OUTPUT, "content": None}],
        {},
        GO + ASKED + "response:f{value:null}<tool_response|>",
    ),
    "thought_preserved_with_calls": (
        [answer("", reasoning="R", tool_calls=[CALL]), answer(reasoning="Q"), USER],
        {"preserve_thinking": True},
        "<|turn>model\n<|channel>thought\nR\n<channel|><|tool_call>call:f{}<tool_call|><|tool_response>A<turn|>\n" + GO,
    ),
    "reasoning_comes_first": (
        [answer(reasoning="R", reasoning_content="Q", thinking="P")],
        {},
        "<|turn>model\n<|channel>thought\nR\n<channel|>A<turn|>\n",
    ),
    "thinking_is_an_alias": ([answer(thinking="P")], {}, "<|turn>model\n<|channel>thought\nP\n<channel|>A<turn|>\n"),
    "unclosed_thought_in_content": ([answer("a<channel|>b <|channel>c")], {}, "<|turn>model\nab<turn|>\n"),
    "aliases_and_unknown_parts": (
        [{"role": "user", "content": [{"type": kind} for kind in ("image_url", "input_audio", "video_url", "video")]}],
        {},
        "<|turn>user\n<|image|><|audio|><|video|><turn|>\n",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_the_golden_cases_leave_out(name: str) -> None:
    messages, flags, expected = RULES[name]
    assert render(messages, **flags).text == "<bos>" + expected
    assert with_jinja(messages, None, "small", **flags)[0] == "<bos>" + expected


SCHEMAS: dict[str, tuple[dict[str, Any], str]] = {
    "name_only": ({"name": "n"}, 'description:<|"|><|"|>'),
    "no_type_leaves_the_brace_open": (
        {"description": "d", "parameters": {"required": ["a"]}},
        'description:<|"|>d<|"|>,parameters:{required:[<|"|>a<|"|>],',
    ),
    "response": (
        {"description": "d", "response": {"type": "object", "description": "r", "properties": {"x": {}}}},
        'description:<|"|>d<|"|>,response:{description:<|"|>r<|"|>,type:<|"|>OBJECT<|"|>}',
    ),
    "response_of_another_type_leaves_the_brace_open": (
        {"description": "d", "response": {"type": "string", "description": "r"}},
        'description:<|"|>d<|"|>,response:{description:<|"|>r<|"|>,',
    ),
    "object_without_properties": (
        {"parameters": {"properties": {"o": {"type": "object", "additionalProperties": False}}, "type": "object"}},
        'description:<|"|><|"|>,parameters:{properties:{o:{properties:{additionalProperties:{type:<|"|><|"|>}},'
        'type:<|"|>OBJECT<|"|>}},type:<|"|>OBJECT<|"|>}',
    ),
    "list_types": (
        {"parameters": {"properties": {"o": {"type": ["string", "null"], "enum": ["a"]}}, "type": "object"}},
        "description:<|\"|><|\"|>,parameters:{properties:{o:{type:<|\"|>['STRING', 'NULL']<|\"|>}},"
        'type:<|"|>OBJECT<|"|>}',
    ),
    "items_keep_every_key": (
        {
            "parameters": {
                "type": "object",
                "properties": {
                    "l": {
                        "type": "array",
                        "items": {"type": ["string", "null"], "default": None, "anyOf": [{"minLength": 1}], "Max": 2},
                        "minItems": 1,
                    }
                },
            }
        },
        'description:<|"|><|"|>,parameters:{properties:{l:{items:{anyOf:[{<|"|>minLength<|"|>:1}],Max:2,'
        'type:[<|"|>STRING<|"|>,<|"|>NULL<|"|>]},type:<|"|>ARRAY<|"|>}},type:<|"|>OBJECT<|"|>}',
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_declarations_the_golden_cases_leave_out(name: str) -> None:
    function, expected = SCHEMAS[name]
    text = f"<bos><|turn>system\n<|tool>declaration:n{{{expected}}}<tool|><turn|>\n"
    tools = [{"type": "function", "function": {"name": "n", **function}}]
    assert render([], tools=tools).text == text
    assert with_jinja([], tools, "small")[0] == text


def test_media_and_turn_ends_come_from_the_structure() -> None:
    parts = [text_part("typed <|image|><turn|>\n "), {"type": "image"}, {"type": "input_audio"}]
    rendered = render([{"role": "user", "content": parts}, ASKS, OUTPUT, answer([{"type": "video"}]), USER])
    assert [(kind, rendered.text[a:b]) for kind, a, b in rendered.media] == [
        ("image", "<|image|>"),
        ("audio", "<|audio|>"),
        ("video", "<|video|>"),
    ]
    assert rendered.media[0][1] == rendered.text.index("<|image|><|audio|>")
    bounds = [0, *rendered.turn_ends]
    assert [rendered.text[a:b] for a, b in pairwise(bounds)] == [
        "<bos><|turn>user\ntyped <|image|><turn|><|image|><|audio|><turn|>\n",
        ANSWERED + "<|video|><turn|>\n",
        GO,
    ]


@pytest.mark.parametrize(
    ("messages", "tools", "flags", "sentence"),
    [
        ([USER], None, {"size": "31b"}, r"size='31b' is no chat template; legal: small, large\."),
        ([USER], None, {"revision": "may"}, "revision='may' is no chat template; legal: 2026-07-09"),
        (["Go"], None, {}, r"messages\[0\] is of type str; give an object"),
        ([USER, {"content": "x"}], None, {}, r"messages\[1\]\.role is of type NoneType; give system, user"),
        ([{"role": "user", "content": {"a": 1}}], None, {}, r"messages\[0\]\.content is an object; give a string"),
        ([{"role": "user", "content": ["x"]}], None, {}, r"messages\[0\]\.content\[0\] is of type str; give an object"),
        (
            [answer([{"type": "text"}])],
            None,
            {},
            r"content\[0\]\.text is of type NoneType; give a string",
        ),
        ([answer(reasoning=["x"])], None, {}, r"messages\[0\]\.reasoning is of type list; give a string"),
        ([answer(tool_calls=5)], None, {}, r"messages\[0\]\.tool_calls is of type int; give a list"),
        (
            [answer(tool_calls=[{"name": "f"}])],
            None,
            {},
            r"tool_calls\[0\]\.function is of type NoneType",
        ),
        (
            [answer(tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])],
            None,
            {},
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments is of type str; give an object, parsed",
        ),
        ([ASKS, {**OUTPUT, "content": {"t": 1}}], None, {}, r"messages\[1\]\.content is an object; .*tool_responses"),
        ([], [{"name": "f"}], {}, r"tools\[0\]\.function is of type NoneType; give an object with a name"),
        ([], [{"function": {"parameters": {"required": 5}}}], {}, r"tools\[0\]\.function has a damaged schema"),
        ([USER], None, {"continue_final_message": True}, "needs an assistant message at the end"),
        ([{**ASKS, "content": "A"}, OUTPUT], None, {"continue_final_message": True}, "needs an assistant message"),
        ([], None, {"continue_final_message": True}, "needs an assistant message at the end; add one"),
        ([answer([{"type": "image"}])], None, {"continue_final_message": True}, "has no text to continue; add some"),
        ([answer(" ")], None, {"continue_final_message": True}, "the last message is empty; begin the answer"),
        ([answer("<|channel>x<channel|>y")], None, {"continue_final_message": True}, r"holds a thought, .*reasoning"),
        (
            [answer()],
            None,
            {"continue_final_message": True, "add_generation_prompt": True},
            "exclude each other; leave one out",
        ),
    ],
)
def test_refusals_say_what_to_change(messages: Any, tools: Any, flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ChatError, match=sentence) as refused:
        render(messages, tools=tools, **flags)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_sizes_of_the_shipped_template() -> None:
    with pytest.raises(ChatError, match="size='31b' is no chat template"):
        chat_template("31b")
    small, large = (chat_template(size).splitlines() for size in ("small", "large"))
    assert [(a, b) for a, b in zip(small, large, strict=True) if a != b] == [(small[0], large[0])]


def test_both_ways_agree_on_random_conversations() -> None:
    outcomes = {"rendered": 0, "refused": 0}
    for seed in range(500):
        made = RandomConversation(random.Random(seed))
        messages, tools, flags, size = made.messages(), made.tools(), made.flags(), made.pick("small", "large")
        try:
            rendered = render(messages, tools=tools, size=size, **flags)
        except ChatError as error:
            outcomes["refused"] += 1
            message = str(error)
            assert "\n" not in message and message.endswith(".")
            with pytest.raises(Exception, match=r"."):
                with_jinja(messages, tools, size, **flags)
            continue
        outcomes["rendered"] += 1
        assert with_jinja(messages, tools, size, **flags) == (rendered.text, rendered.supervised), f"seed {seed}"
    assert outcomes["rendered"] > 350 and outcomes["refused"] > 50


def test_transformers_marks_the_same_tokens() -> None:
    """Golden cases end to end: `apply_chat_template` with our template against our own encoding."""
    tokenizer = train_tokenizer([case["rendered"] or "" for case in JULY], 600)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")
    compared = 0
    for case in JULY:
        if case["rendered"] is None or case["kwargs"].get("continue_final_message"):
            continue
        rendered = render(case["messages"], tools=case["tools"], size=case["template"], **case["kwargs"])
        found: Any = theirs.apply_chat_template(
            case["messages"],
            tools=case["tools"],
            chat_template=chat_template(case["template"]),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **case["kwargs"],
        )
        parts = [Part(kind, f"<|{kind}|>") for kind, _, _ in rendered.media]
        ours = encode(rendered, tokenizer, parts)
        assert found["input_ids"] == ours.ids
        assert found["assistant_masks"] == [int(learned) for learned in ours.supervised]
        compared += 1
    assert compared > 20
