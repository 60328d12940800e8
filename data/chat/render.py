"""A conversation as the text Gemma 4 reads, and which of its characters a model learns to write.

    render([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])

The text equals that of the released chat template, quirks included. What is supervised is marked while the text is
written: nothing is escaped in this format, so no search of the text can tell a turn from one that a user typed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.chat.tools import format_declaration, format_value
from model.errors import UserError

Message = Mapping[str, Any]

NEWEST = "2026-07-09"
"""Revision of the released template that is written unless another is asked for."""
SIZES = ("small", "large")
"""The template of E2B and E4B, and that of 12B, 26B-A4B and 31B; they differ in the generation prompt alone."""
MEDIA_KINDS = {"image": "image", "image_url": "image", "audio": "audio", "input_audio": "audio", "video": "video"}
"""Media part types and the kind each stands for."""


class ChatError(UserError):
    """A conversation that has no text in this format."""


@dataclass(frozen=True)
class Revision:
    """What the released template changed over time; the defaults are the newest."""

    null: str = "null"
    after_think: str = "\n"
    around_pictures: str = ""
    """Stands before and after each image and video."""
    thoughts: str = "all"
    """Which messages after the last user keep their thought: "all", those "with_calls", or "none"."""
    string_arguments: bool = False
    """Arguments given as a string are pasted between the braces."""
    balanced: bool = True
    """Consecutive assistants share one turn, and an answered call is closed before a user."""
    tool_turns: bool = False
    """A tool message is a turn of its own, and a call ends its turn."""


_APRIL = Revision(null="None", thoughts="with_calls", string_arguments=True, balanced=False)
REVISIONS = {
    NEWEST: Revision(),
    "2026-04-late": _APRIL,
    "2026-04-02": replace(_APRIL, after_think="", around_pictures="\n\n", thoughts="none", tool_turns=True),
}


@dataclass(frozen=True)
class Rendered:
    """Offsets count characters, ends are exclusive."""

    text: str
    supervised: list[tuple[int, int]]
    """Spans a model learns to write; touching ones are merged."""
    media: list[tuple[str, int, int]]
    """Kind ("image", "audio" or "video") and span of each placeholder that stands for a media part, in text order."""
    turn_ends: list[int]
    """Offsets just after each closed turn."""


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    size: str = "small",
    enable_thinking: bool = False,
    add_generation_prompt: bool = False,
    preserve_thinking: bool = False,
    continue_final_message: bool = False,
    revision: str = NEWEST,
) -> Rendered:
    """Text and spans of a conversation; `continue_final_message` leaves the last answer open.

    A message of the model with "weight" 0 or "train" false is written, and not learned.

    Raises `ChatError` where the released template refuses, or would lose the answer to be continued.
    """
    for name, value, legal in (("size", size, SIZES), ("revision", revision, REVISIONS)):
        if value not in legal:
            raise ChatError(f"{name}={value!r} is no chat template; legal: {', '.join(legal)}.")
    if continue_final_message and add_generation_prompt:
        raise ChatError("continue_final_message and add_generation_prompt exclude each other; leave one out.")
    out = _Writer(REVISIONS[revision])
    steps = _steps(messages, out.rules)
    if continue_final_message and not (messages and messages[-1]["role"] in ("assistant", "model")):
        raise ChatError("continue_final_message needs an assistant message at the end; add one, or leave it out.")
    system = steps.pop(0) if messages and messages[0]["role"] in ("system", "developer") else None
    out.write("<bos>")
    if system or tools or enable_thinking:
        _write_system(out, system, tools or (), enable_thinking)
    last_user = max((i for i, step in enumerate(steps) if step.role == "user"), default=-1)
    for i, step in enumerate(steps):
        previous, following = (steps[k].role if 0 <= k < len(steps) else None for k in (i - 1, i + 1))
        _begin(out, step, previous, keep_thought=i > last_user or (preserve_thinking and bool(step.calls)))
        if continue_final_message and following is None:
            _leave_open(out, step)
        else:
            _finish(out, step, following)
    if add_generation_prompt:
        _write_generation_prompt(out, steps[-1] if steps else None, size, enable_thinking)
    return Rendered("".join(out.pieces), out.supervised, out.media, out.turn_ends)


class _Writer:
    def __init__(self, rules: Revision) -> None:
        self.rules = rules
        self.pieces: list[str] = []
        self.length = 0
        self.supervised: list[tuple[int, int]] = []
        self.media: list[tuple[str, int, int]] = []
        self.turn_ends: list[int] = []

    def write(self, text: str, supervised: bool = False) -> None:
        if not text:
            return
        start, self.length = self.length, self.length + len(text)
        self.pieces.append(text)
        if supervised:
            if self.supervised and self.supervised[-1][1] == start:
                start = self.supervised.pop()[0]
            self.supervised.append((start, self.length))

    def write_media(self, kind: str) -> None:
        around = "" if kind == "audio" else self.rules.around_pictures
        self.write(around)
        start = self.length
        self.write(f"<|{kind}|>")
        self.media.append((kind, start, self.length))
        self.write(around)

    def close_turn(self, supervised: bool) -> None:
        self.write("<turn|>", supervised)
        self.write("\n")
        self.turn_ends.append(self.length)


@dataclass
class _Step:
    """A message that is written, with the tool messages that answer its calls."""

    message: Message
    where: str
    outputs: list[tuple[str, Message]] = field(default_factory=list)
    """Place and message of each."""

    @property
    def role(self) -> str:
        return self.message["role"]

    @property
    def speaker(self) -> str:
        return "model" if self.role == "assistant" else self.role

    @property
    def by_model(self) -> bool:
        return self.speaker == "model"

    @property
    def learned(self) -> bool:
        return self.by_model and self.message.get("weight") != 0 and self.message.get("train") is not False

    @property
    def calls(self) -> Sequence[Any]:
        return self.message.get("tool_calls") or ()

    @property
    def answered(self) -> bool:
        return bool(self.outputs or self.message.get("tool_responses"))


def _steps(messages: Sequence[Message], rules: Revision) -> list[_Step]:
    steps: list[_Step] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        _expect(message, Mapping, where, "give an object with a role and a content")
        role = _expect(message.get("role"), str, f"{where}.role", "give system, user, assistant or tool")
        for key in ("tool_calls", "tool_responses"):
            _expect(message.get(key) or [], (list, tuple), f"{where}.{key}", "give a list")
        if role != "tool" or rules.tool_turns:
            steps.append(_Step(message, where))
        elif steps and steps[-1].calls and not steps[-1].message.get("tool_responses"):
            steps[-1].outputs.append((where, message))
    return steps


def _write_system(out: _Writer, step: _Step | None, tools: Sequence[Any], thinking: bool) -> None:
    out.write("<|turn>system\n")
    if thinking:
        out.write("<|think|>" + out.rules.after_think)
    if step:
        content = step.message.get("content")
        space = "" if isinstance(content, str) else " "
        for part in _parts(content, step.where):
            out.write(str(part.get("text", "")).strip() + space)
    for i, tool in enumerate(tools):
        out.write(f"<|tool>{_declaration(tool, f'tools[{i}]', out.rules.null)}<tool|>")
    out.close_turn(supervised=False)


def _begin(out: _Writer, step: _Step, previous: str | None, keep_thought: bool) -> None:
    """Header, thought, calls and what the tools returned."""
    if out.rules.tool_turns or not (step.by_model and previous == "assistant"):
        out.write(f"<|turn>{step.speaker}\n")
    if keep_thought and (out.rules.thoughts == "all" or (out.rules.thoughts == "with_calls" and step.calls)):
        _write_thought(out, step)
    for i, call in enumerate(step.calls):
        out.write(_call(call, f"{step.where}.tool_calls[{i}]", out.rules), step.learned)
    for i, (text, media) in enumerate(_outputs(step, out.rules.null)):
        # The model ends its calls by asking for the first output; the other tokens are the runtime's.
        out.write("<|tool_response>", step.learned and bool(step.calls) and i == 0)
        out.write(f"{text}<tool_response|>")
        for kind in media:
            out.write_media(kind)


def _write_thought(out: _Writer, step: _Step) -> None:
    content = step.message.get("reasoning_content")
    thought = step.message.get("reasoning") or (step.message.get("thinking") if content is None else content)
    if thought:
        _expect(thought, str, f"{step.where}.reasoning", "give a string")
        out.write(f"<|channel>thought\n{thought}\n<channel|>", step.learned)


def _finish(out: _Writer, step: _Step, following: str | None) -> None:
    """Content, and the end of the turn unless a tool or the next message goes on with it."""
    balanced = out.rules.balanced
    has_content = _write_content(out, step, _parts(step.message.get("content"), step.where))
    if step.calls and not step.answered and not out.rules.tool_turns:
        out.write("<|tool_response>", step.learned)
    elif balanced and step.by_model and following == "assistant":
        pass
    elif has_content or not step.answered or (balanced and following):
        out.close_turn(step.learned)


def _leave_open(out: _Writer, step: _Step) -> None:
    """Content up to its last text, to be continued."""
    parts = _parts(step.message.get("content"), step.where)
    while parts and parts[-1].get("type") != "text":
        parts.pop()
    if not parts:
        raise ChatError("the last message has no text to continue; add some, or leave continue_final_message out.")
    _write_content(out, step, parts)
    if out.pieces[-1].endswith("\n"):
        raise ChatError("the last message is empty; begin the answer, or use add_generation_prompt instead.")
    if without_thoughts(parts[-1]["text"]) != parts[-1]["text"]:
        raise ChatError("the last message holds a thought, which is left out; move it to reasoning.")


def _write_content(out: _Writer, step: _Step, parts: Sequence[Message]) -> bool:
    """Tells whether there was anything to write."""
    start = out.length
    for i, part in enumerate(parts):
        kind = _media_kind(part)
        if kind:
            out.write_media(kind)
        elif part.get("type") == "text" and step.by_model:
            text = _expect(part.get("text"), str, f"{step.where}.content[{i}].text", "give a string")
            out.write(without_thoughts(text).strip(), step.learned)
        elif part.get("type") == "text":
            out.write(str(part.get("text", "")).strip())
    return out.length > start


def _write_generation_prompt(out: _Writer, last: _Step | None, size: str, thinking: bool) -> None:
    answered = last is not None and last.answered
    opens = not answered and (out.rules.tool_turns or not (last and last.calls))
    if opens:
        out.write("<|turn>model\n")
    if answered and thinking and out.rules.balanced:
        out.write("<|channel>thought\n")
    if size == "large" and not thinking and (opens or (answered and out.rules.tool_turns)):
        out.write("<|channel>thought\n<channel|>")


def _outputs(step: _Step, null: str) -> Iterator[tuple[str, list[str]]]:
    """What each tool returned, as text, and the kinds of the media in it."""
    for i, response in enumerate(step.message.get("tool_responses") or ()):
        where = f"{step.where}.tool_responses[{i}]"
        value = _expect(response, Mapping, where, "give an object with a name and a response").get("response", [])
        values = value if isinstance(value, Mapping) else {"value": value}
        yield f"response:{_name(response, where)}{format_value(values, null)}", []
    for where, message in step.outputs:
        value, media = message.get("content"), []
        if isinstance(value, list | tuple | Mapping):
            parts = _parts(value, where)
            texts = [part.get("text") for part in parts if part.get("type") == "text"]
            value = "".join(_expect(text, str, f"{where}.content", "give each text part a string") for text in texts)
            media = [kind for part in parts if (kind := _media_kind(part))]
        # Without ids on either side all calls match, and the last one wins.
        called = [call for call in step.calls if call.get("id") == message.get("tool_call_id")]
        name = called[-1]["function"]["name"] if called else _name(message, where)
        yield f"response:{name}{format_value({'value': value}, null)}", media


def _name(message: Message, where: str) -> str:
    return _expect(message.get("name") or "unknown", str, f"{where}.name", "give a string")


def _parts(content: Any, where: str) -> list[Message]:
    """A string is one text part; null, and whatever else can hold no parts, is none."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, Mapping) and content:
        fix = "give a string or a list of parts, or put a tool's result into tool_responses"
        raise ChatError(f"{where}.content is an object; {fix}.")
    if not isinstance(content, list | tuple):
        return []
    return [
        _expect(part, Mapping, f"{where}.content[{i}]", "give an object with a type") for i, part in enumerate(content)
    ]


def _media_kind(part: Message) -> str | None:
    return MEDIA_KINDS.get(str(part.get("type")))


def without_thoughts(text: str) -> str:
    """A text without what stands between channel tokens; an unclosed thought runs to the end."""
    return "".join(piece.partition("<|channel>")[0] for piece in text.split("<channel|>"))


def _call(call: Any, where: str, rules: Revision) -> str:
    function = _function(call, where)
    name = _expect(function.get("name"), str, f"{where}.function.name", "give a string")
    arguments = function.get("arguments", "")
    if rules.string_arguments and isinstance(arguments, str):
        return f"<|tool_call>call:{name}{{{arguments}}}<tool_call|>"
    if arguments is not None:
        _expect(arguments, Mapping, f"{where}.function.arguments", "give an object, parsed from its JSON")
    return f"<|tool_call>call:{name}{format_value(arguments or {}, rules.null)}<tool_call|>"


def _declaration(tool: Any, where: str, null: str) -> str:
    function = _function(tool, where)
    try:
        return format_declaration(function, null)
    except (TypeError, AttributeError) as error:
        raise ChatError(f"{where}.function has a damaged schema ({error}); give a JSON schema.") from None


def _function(holder: Any, where: str) -> Mapping[str, Any]:
    _expect(holder, Mapping, where, "give an object with a function")
    return _expect(holder.get("function"), Mapping, f"{where}.function", "give an object with a name")


def _expect(value: Any, kind: type | tuple[type, ...], where: str, fix: str) -> Any:
    if not isinstance(value, kind):
        raise ChatError(f"{where} is of type {type(value).__name__}; {fix}.")
    return value
