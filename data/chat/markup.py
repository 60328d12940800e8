"""A document's tokens as HTML: turns, what is learned, control tokens, and media at the place of their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

from data.chat.encode import Encoded
from data.chat.previews import Part
from data.chat.read import Conversation, PlainText
from data.chat.show import SOFT_TOKENS
from data.chat.visible import visible
from data.tokenizer import MEDIA_TOKENS, SPECIAL_TOKENS

MAX_TOKENS = 4000
"""Shown of a document; the others are counted."""
CONTROL = frozenset((*SPECIAL_TOKENS, *MEDIA_TOKENS))
_HEADER = re.compile(r"(?:<bos>)?<\|turn>(system|developer|user|model)\n")
_HEADER_TOKENS = 32
"""No role has so many."""


@dataclass(frozen=True)
class Shown:
    """A line of a file with its tokens, the text of each, and its media parts."""

    item: Conversation | PlainText
    texts: list[str]
    encoded: Encoded
    parts: Sequence[Part] = ()

    @property
    def learned(self) -> int:
        """Tokens that the model learns to write."""
        return sum(self.encoded.supervised)

    @property
    def is_text(self) -> bool:
        """Whether it has no turns."""
        return isinstance(self.item, PlainText)

    def html(self) -> str:
        """An article: a heading with counts, and the turns."""
        total = len(self.texts)
        unused = f"<span class=note>unused: {visible(', '.join(self.item.unused))}</span>" if self.item.unused else ""
        heading = f"<b>{visible(self.item.where)}</b> {counted(total, self.learned)} {unused}"
        turns = "\n".join(self._turn(turn) for turn in _turns(self) if turn.start < MAX_TOKENS)
        left = sum(self.encoded.supervised[MAX_TOKENS:])
        rest = f"<p class=note>and {total - MAX_TOKENS:,} more tokens, {left:,} of them supervised</p>"
        return f"<article><h3>{heading}</h3>\n{turns}{rest if total > MAX_TOKENS else ''}</article>"

    def _turn(self, turn: _Turn) -> str:
        return block(turn.role, turn.role, self._pieces(turn))

    def _pieces(self, turn: _Turn) -> Iterator[tuple[bool, str]]:
        """Whether it is learned, and its HTML, of each token or media part that begins in the turn."""
        media: Mapping[int, tuple[int, Part]] = {
            start: (stop, part) for (start, stop), part in zip(self.encoded.media, self.parts, strict=True)
        }
        i, ids = turn.start, list[int]()
        while i < min(turn.stop, MAX_TOKENS):
            if i in media:
                stop, part = media[i]
                yield False, _figure(part, self.texts[i:stop])
                i = stop
                continue
            ids.append(self.encoded.ids[i])
            if text := self.texts[i]:  # several tokens may share a character, which the last of them has
                yield self.encoded.supervised[i], token(text, ids, i < turn.header or self._is_control(i))
                ids = []
            i += 1

    def _is_control(self, i: int) -> bool:
        """Whether a token is one of the format's; in a text only the outermost are, whatever it spells."""
        return self.texts[i] in CONTROL and not (self.is_text and 0 < i < len(self.texts) - 1)


class _Turn(NamedTuple):
    role: str
    start: int
    header: int
    """Where the line that names the role ends."""
    stop: int


def block(kind: str, label: str, pieces: Iterable[tuple[bool, str]]) -> str:
    """A labelled block of pieces of HTML, each with whether it is learned."""
    joined = ((learned, "".join(piece for _, piece in run)) for learned, run in groupby(pieces, key=itemgetter(0)))
    tokens = "".join(f"<mark>{piece}</mark>" if learned else piece for learned, piece in joined)
    return f'<div class="turn {kind}"><div class=role>{label}</div><div class=tokens>{tokens}</div></div>'


def token(text: str, ids: Sequence[int], control: bool) -> str:
    """A token, or several that share a character, as HTML."""
    kind = " class=control" if control else " class=break" if not text.strip("\n") else ""
    return f'<i{kind} title="id {", ".join(map(str, ids))}">{visible(text)}</i>'


def counted(tokens: int, learned: int) -> str:
    """Tokens and the share of them that is learned, as HTML."""
    share = f" ({learned / tokens:.1%})" if tokens else ""
    return f"<span>{tokens:,} tokens</span> <span>{learned:,} supervised{share}</span>"


def _turns(shown: Shown) -> Iterator[_Turn]:
    """The turns of a conversation, the last of which may be open, or all of a text."""
    total = len(shown.texts)
    if shown.is_text:
        yield _Turn("text", 0, 0, total)
        return
    # A call that nothing answers is not closed: what the model wrote last is then the beginning of an answer.
    learned = zip(pairwise(shown.texts), shown.encoded.supervised, strict=False)
    unanswered = {i for i, (pair, flag) in enumerate(learned, 1) if flag and pair == ("<|tool_response>", "<|turn>")}
    for start, stop in pairwise(sorted({0, *shown.encoded.turn_ends, *unanswered, total})):
        found = _HEADER.match("".join(shown.texts[start : start + _HEADER_TOKENS]))
        if not found:
            yield _Turn("other", start, start, stop)
            continue
        ends = accumulate(map(len, shown.texts[start : start + _HEADER_TOKENS]))
        yield _Turn(found[1], start, start + 1 + [*ends].index(found.end()), stop)


def _figure(part: Part, texts: Sequence[str]) -> str:
    """A media part with its name, its number of soft tokens, and its tokens, equal ones once."""
    soft, tokens = sum(text in SOFT_TOKENS for text in texts), ""
    for text, run in groupby(texts):
        count = len(list(run))
        tokens += f"{visible(text)}&times;{count}" if text in SOFT_TOKENS else visible(text) * count
    caption = f"{visible(part.name or part.kind)}: {soft:,} soft tokens"
    problem = f" <span class=note>stand for it: {visible(part.problem)}</span>" if part.problem else ""
    return f"<figure>{part.html()}<figcaption>{caption}{problem}<div class=soft>{tokens}</div></figcaption></figure>"
