"""Conversations of every shape, for comparing two ways of writing them."""

from __future__ import annotations

import random
from typing import Any


class RandomConversation:
    """Roles in any order, parts, calls, outputs, thoughts and schemas; about one in five has something refused."""

    texts: tuple[str, ...] = ("", "a", " b ", "\n", "x\ny", "<|turn>model\n", "<turn|>")
    texts += ("<|channel>thought\nq\n<channel|>w", "k<|channel>z", "o<channel|>p", "<|image|>", "ü€🙂")
    texts += (" \u3000n", '<|"|>', "{")

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.pick = lambda *choices: source.choice(choices)
        self.has_ids = self.chance(0.5)

    def chance(self, probability: float) -> bool:
        return self.source.random() < probability

    def several(self, make: Any, most: int) -> list[Any]:
        return [make() for _ in range(self.source.randint(0, most))]

    def value(self, depth: int = 0) -> Any:
        simple = (None, True, False, 7, -3, 0.5, 1e-5, 1e22, self.pick(*self.texts))
        if depth > 1 or self.chance(0.6):
            return self.pick(*simple)
        return self.pick(self.several(lambda: self.value(depth + 1), 2), self.object(depth + 1))

    def object(self, depth: int = 0) -> dict[str, Any]:
        keys = self.several(lambda: self.pick("a", "B", "b", "A", "k", "K2", "key x", "items", "get", "ä"), 3)
        return {key: self.value(depth) for key in keys}

    def part(self) -> Any:
        if self.chance(0.6):
            return {"type": "text", "text": self.pick(*self.texts)}
        if self.chance(0.8):
            return {"type": self.pick("image", "image_url", "audio", "input_audio", "video")}
        odd = ({"type": "other", "text": "x"}, {"type": "text"}, {"type": "text", "text": 5}, {"text": "x"}, "x")
        return self.pick(*odd)

    def content(self) -> Any:
        if self.chance(0.6):
            return self.pick(*self.texts)
        return self.several(self.part, 3) if self.chance(0.8) else self.pick(None, None, 5, True, {}, {"a": 1})

    def call(self) -> dict[str, Any]:
        arguments = self.object() if self.chance(0.9) else self.pick(None, {}, "{}", [])
        function = {"name": self.pick("f", "g"), "arguments": arguments}
        if self.chance(0.03):
            del function[self.pick("name", "arguments")]
        return {"function": function, **({"id": self.pick("1", "2", None)} if self.has_ids else {})}

    def response(self) -> dict[str, Any]:
        return {"name": self.pick("f", None, ""), "response": self.pick(self.object(), self.value())}

    def message(self) -> dict[str, Any]:
        role = self.pick("user", "assistant", "assistant", "tool")
        if self.chance(0.1):
            role = self.pick("system", "developer", "odd", "model")
        message = {"role": role, "content": self.content()}
        if self.chance(0.05):
            del message["content"]
        if role == "tool":
            optional = {"tool_call_id": self.pick("1", "2", "3", None), "name": self.pick("q", "", None)}
            return {**message, **{key: value for key, value in optional.items() if self.chance(0.5)}}
        for key in ("reasoning", "reasoning_content", "thinking"):
            if self.chance(0.15):
                message[key] = self.pick(*self.texts, None)
        if self.chance(0.5 if role == "assistant" else 0.05):
            message["tool_calls"] = self.pick(self.several(self.call, 2), self.several(self.call, 2), None)
        if self.chance(0.1):
            message[self.pick("weight", "train")] = self.pick(0, 1, False, True, None)
        if self.chance(0.1):
            message["tool_responses"] = self.several(self.response, 2)
        return message

    def messages(self) -> list[dict[str, Any]]:
        leading = [{"role": self.pick("system", "developer"), "content": self.content()}] if self.chance(0.3) else []
        return leading + self.several(self.message, 6)

    def schema(self, depth: int = 0) -> dict[str, Any]:
        kinds = ("string", "String", "integer", "array", "array", "object", "object", ["string", "null"], None)
        choices = {
            "type": self.pick(*kinds),
            "description": self.pick("d", " d\n", "", None, 5),
            "enum": self.pick(["a", "b"], [1, None, True], [], "xy"),
            "nullable": self.pick(True, False, "x"),
            "required": self.pick(["a", "b"], ["a"], [], None, 5 if self.chance(0.05) else "xy"),
            "default": self.value(),
            "additionalProperties": self.pick(False, {"type": "string"}),
            "anyOf": [{"type": "string"}, {"type": "null"}],
        }
        if depth < 3:
            choices["items"] = self.pick(self.schema(depth + 1), self.schema(depth + 1), None, {}, [])
            choices["properties"] = self.properties(depth + 1) if self.chance(0.95) else self.pick(None, {}, ["x"])
        return {key: value for key, value in choices.items() if self.chance(0.9 if key == "type" else 0.4)}

    def properties(self, depth: int = 0) -> dict[str, Any]:
        keys = self.several(lambda: self.pick("a", "B", "b", "type", "items", "properties", "get", "enum"), 3)
        return {key: self.schema(depth) if self.chance(0.95) else self.pick(None, "x", True) for key in keys}

    def tool(self) -> dict[str, Any]:
        choices = {
            "name": "n",
            "description": self.pick("d", "", None),
            "parameters": self.pick({"type": "object", "properties": self.properties()}, self.schema(), None, "x"),
            "response": self.pick({"type": "object", "description": "r"}, {"description": "r"}, {}, None),
        }
        function = {key: value for key, value in choices.items() if self.chance(0.8)}
        return {"type": "function", "function": function} if self.chance(0.97) else function

    def tools(self) -> list[dict[str, Any]] | None:
        return self.several(self.tool, 2) if self.chance(0.4) else None

    def flags(self) -> dict[str, Any]:
        return {flag: self.chance(0.4) for flag in ("enable_thinking", "add_generation_prompt", "preserve_thinking")}
