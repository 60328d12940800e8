"""Conversations as the model reads them, with what it learns to write in colour, for a terminal.

A media part is shown as four soft tokens, whatever its file would give.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

from tokenizers import Encoding, Tokenizer

from data.chat.encode import Encoded, Media, encode_text, expand, marked, tokenise
from data.chat.read import Conversation, PlainText, located
from data.tokenizer import train_tokenizer

GREEN, RESET = "\033[32m", "\033[0m"
LEFT, RIGHT = "⟦", "⟧"
"""Around supervised text where colour is not wanted."""
BORDER = "·"
SOFT_TOKENS = ("<|image|>", "<|audio|>", "<|video|>")
_VOCAB_SIZE = 512
_WEATHER = {
    "name": "get_weather",
    "description": "Current weather for a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
DEMO = Conversation(
    where="demo",
    messages=[
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which city is this? Does it rain?"}]},
        {
            "role": "assistant",
            "reasoning": "An opera house like an iceberg: Oslo.",
            "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "light rain, 4 °C"},
        {"role": "assistant", "content": "Oslo, and yes: light rain."},
    ],
    tools=[{"type": "function", "function": _WEATHER}],
    flags={},
)


@dataclass(frozen=True)
class StandIn:
    """A media part without a file."""

    kind: str

    @property
    def placeholder(self) -> str:
        """Four soft tokens between the marks of a real image or sound."""
        outer = "audio" if self.kind == "audio" else "image"
        return f"<|{outer}>{f'<|{self.kind}|>' * 4}<{outer}|>"


def mark(pieces: Sequence[str], supervised: Sequence[bool], colour: bool = True, borders: bool = False) -> str:
    """The texts of tokens joined, supervised runs in green or between brackets."""
    marked = ""
    for learned, run in groupby(_collapsed(pieces, supervised), key=itemgetter(1)):
        text = (BORDER if borders else "").join(_printable(piece) for piece, _ in run if piece)
        if learned and colour:
            # Line by line: pagers drop a colour at the end of a line.
            text = "\n".join(f"{GREEN}{line}{RESET}" if line else "" for line in text.split("\n"))
        marked += f"{LEFT}{text}{RIGHT}" if learned and not colour else text
    return marked


def _collapsed(pieces: Sequence[str], supervised: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    for (piece, learned), run in groupby(zip(pieces, supervised, strict=True)):
        count = len(list(run))
        if piece in SOFT_TOKENS and count > 1:
            yield f"{piece}x{count}", learned
        else:
            yield from [(piece, learned)] * count


def _printable(text: str) -> str:
    """Without characters that drive a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def shown_tokens(
    item: Conversation | PlainText,
    tokenizer: Tokenizer | None,
    size: str,
    flags: dict[str, Any],
    media: Sequence[Media] | None = None,
) -> tuple[list[str], Encoded]:
    """Text of each token, and the tokens; without a tokenizer one is trained on the item itself.

    `media` holds what takes the place of each media part, in order; without it stand-ins do.
    """
    if isinstance(item, PlainText):
        tokenizer = tokenizer or train_tokenizer([item.text], _VOCAB_SIZE)
        encoding = tokenise(item.text, tokenizer, control_tokens=False)
        return ["<bos>", *_pieces(item.text, encoding), "<eos>"], encode_text(item.text, tokenizer)
    rendered = item.render(size, **flags)
    tokenizer = tokenizer or train_tokenizer([rendered.text], _VOCAB_SIZE)
    media = [StandIn(kind) for kind, _, _ in rendered.media] if media is None else media
    with located(item.where):
        expanded = expand(rendered, media)
        encoding = tokenise(expanded.text, tokenizer, control_tokens=True)
        return _pieces(expanded.text, encoding), marked(expanded, encoding, tokenizer)


def _pieces(text: str, encoding: Encoding) -> list[str]:
    """Where several tokens share a character, the last has it."""
    starts = [start for start, _ in encoding.offsets]
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]
