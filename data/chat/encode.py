"""Rendered conversations as tokens, each of which is marked if the model learns to write it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from tokenizers import Encoding, Tokenizer

from data.chat.read import ConversationError
from data.chat.render import Rendered
from data.tokenizer import BOS, EOS, MEDIA_TOKENS


class Media(Protocol):
    """What takes the place of one media part."""

    @property
    def kind(self) -> str:
        """image, video or audio."""
        ...

    @property
    def placeholder(self) -> str:
        """Text of special tokens, one for each soft token that the media fill."""
        ...


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation or document; offsets and ranges count tokens, ends are exclusive."""

    ids: list[int]
    supervised: list[bool]
    """Whether the model learns to write this very token: not shifted."""
    turn_ends: list[int]
    """Where the tokens may be cut: just after each closed turn, or anywhere in a document."""
    media: list[tuple[int, int]]
    """Range of each media part."""


def expand(rendered: Rendered, media: Sequence[Media]) -> Rendered:
    """The conversation with the placeholder of each media part written out.

    Raises `ConversationError` unless `media` holds the parts of the conversation in order.
    """
    expected, given = [kind for kind, _, _ in rendered.media], [item.kind for item in media]
    if expected != given:
        raise ConversationError(
            f"the conversation has media parts [{', '.join(expected)}] but was given [{', '.join(given)}]; "
            "give one item for each part, in the order of the text."
        )
    text, end, lengths = "", 0, []
    for item, (_, start, stop) in zip(media, rendered.media, strict=True):
        text += rendered.text[end:start] + item.placeholder
        lengths.append(len(item.placeholder) - (stop - start))
        end = stop
    stops, growth = [stop for _, _, stop in rendered.media], [0, *accumulate(lengths)]

    def moved(offset: int) -> int:
        return offset + growth[bisect_right(stops, offset)]

    return Rendered(
        text + rendered.text[end:],
        [(moved(start), moved(stop)) for start, stop in rendered.supervised],
        [(kind, moved(start), moved(stop)) for kind, start, stop in rendered.media],
        [moved(turn_end) for turn_end in rendered.turn_ends],
    )


def encode(rendered: Rendered, tokenizer: Tokenizer, media: Sequence[Media] = ()) -> Encoded:
    """Tokens of a conversation; one is supervised if its first character is.

    `media` holds what stands for each media part, in order. Raises `ConversationError` if it does not fit the
    conversation, if a text spells a media token, or if the tokenizer does not know the chat format.
    """
    expanded = expand(rendered, media)
    return marked(expanded, tokenise(expanded.text, tokenizer, control_tokens=True), tokenizer)


def marked(expanded: Rendered, encoding: Encoding, tokenizer: Tokenizer) -> Encoded:
    """The tokens of a conversation whose media are written out, with what is learned; raises as `encode` does."""
    if tokenizer.token_to_id("<turn|>") is None:
        raise ConversationError("the tokenizer has no <turn|> token; give the tokenizer of Gemma 4.")
    starts = [start for start, _ in encoding.offsets]

    def token_range(start: int, stop: int) -> tuple[int, int]:
        return bisect_left(starts, start), bisect_left(starts, stop)

    supervised = [False] * len(starts)
    for span in expanded.supervised:
        first, end = token_range(*span)
        supervised[first:end] = [True] * (end - first)
    ranges = [token_range(start, stop) for _, start, stop in expanded.media]
    _refuse_typed_media(encoding, expanded.text, tokenizer, ranges)
    return Encoded(encoding.ids, supervised, [bisect_left(starts, end) for end in expanded.turn_ends], ranges)


def encode_text(text: str, tokenizer: Tokenizer) -> Encoded:
    """A plain document between `<bos>` and `<eos>`, supervised but for the first; control tokens in it are text."""
    ids = [BOS, *tokenise(text, tokenizer, control_tokens=False).ids, EOS]
    return Encoded(ids, [False] + [True] * (len(ids) - 1), list(range(1, len(ids) + 1)), [])


def tokenise(text: str, tokenizer: Tokenizer, control_tokens: bool) -> Encoding:
    """Tokens of a text; `control_tokens` tells whether text that spells one becomes one."""
    check_text(text)
    return tokenise_all([text], tokenizer, control_tokens)[0]


def check_text(text: str) -> None:
    """Raises `ConversationError` for text that has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConversationError(f"the text has half a surrogate pair at character {error.start}; remove it.") from None


def tokenise_all(texts: list[str], tokenizer: Tokenizer, control_tokens: bool) -> list[Encoding]:
    """Tokens of checked texts, by all processors at once."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = not control_tokens
    try:
        return tokenizer.encode_batch(texts, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = before


def truncate(encoded: Encoded, length: int) -> Encoded:
    """The most whole turns that fit in `length` tokens, with the media inside them.

    A conversation that fits is left alone. Raises `ConversationError` if what fits has nothing supervised.
    """
    if len(encoded.ids) <= length:
        return encoded
    end = max((end for end in encoded.turn_ends if end <= length), default=0)
    if not any(encoded.supervised[:end]):
        raise ConversationError(
            f"the whole turns in the first {length} of {len(encoded.ids)} tokens have nothing supervised; "
            "raise the sequence length or leave the conversation out."
        )
    return Encoded(
        encoded.ids[:end],
        encoded.supervised[:end],
        [turn_end for turn_end in encoded.turn_ends if turn_end <= end],
        [(start, stop) for start, stop in encoded.media if stop <= end],
    )


def _refuse_typed_media(encoding: Encoding, text: str, tokenizer: Tokenizer, ranges: list[tuple[int, int]]) -> None:
    """A media token that a text spells would take the features of a media part."""
    names = {tokenizer.token_to_id(token): token for token in MEDIA_TOKENS}
    inside = {i for first, end in ranges for i in range(first, end)}
    for i, token_id in enumerate(encoding.ids):
        if token_id in names and i not in inside:
            start, end = encoding.offsets[i]
            raise ConversationError(
                f"a text spells the media token {names[token_id]} (in {text[max(0, start - 20) : end + 20]!r}); "
                "make it a media part or spell it otherwise."
            )
