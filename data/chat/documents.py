"""Conversations as a kind of corpus, each a document that is packed whole.

A source is records of {"messages": [...]}, with "tools" and flags if wanted, {"text": "..."}, or another shape of
`data.chat.shapes`, in .jsonl or any other of `data.containers`. A media part names a local file, {"type": "image",
"path": "cat.png"}; a relative path starts at the folder of the file that holds the record. One that holds
{"bytes": ...} is kept with the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.chat.encode import Encoded, check_text, encode_text, expand, marked, tokenise_all, truncate
from data.chat.media import media_paths
from data.chat.read import ANY_SHAPE, Conversation, ConversationError, PlainText, located, parse_line
from data.chat.render import NEWEST, Rendered
from data.chat.shapes import LineShape
from data.chat.template import template_size
from data.containers.records import RECORDS, Batch, records_of
from data.corpus.counts import add
from data.corpus.held_out import hash_of
from data.corpus.packing import Whole
from data.corpus.reading import Reading
from data.corpus.shards import Document
from data.corpus.sources import SourceFiles, source_files
from data.media.files import MediaFile, check_media_tokens, digest, measure, media_processor
from data.media.kept import keep_media, placed
from data.media.process import MediaItem, MediaProcessor
from data.tokenizer import load_tokenizer
from data.workers import in_order, in_worker
from model import ConfigError, Gemma4Config, UserError

ON_LONG = ("cut", "drop", "refuse")


@dataclass(frozen=True)
class ChatFormat:
    """Conversations as this model reads them; `thinking` turns thinking on in every line; `shape` is that of lines.

    on_long says what becomes of a conversation of more than `sequence_length` tokens, or of more than
    `max_media_tokens` soft tokens of media: it is cut to whole turns, dropped, or refused. One with nothing supervised,
    or only beyond that, is left out. Media files are read to learn their sizes, and kept by name and digest.
    """

    tokenizer: Path | None
    config: Gemma4Config
    sequence_length: int
    thinking: bool = False
    shape: LineShape = ANY_SHAPE
    on_long: str = "cut"
    max_media_tokens: int | None = None
    packing = Whole
    noun = "conversations"
    fix = "give conversations with an assistant, or raise data.sequence_length"

    @cached_property
    def processor(self) -> MediaProcessor:
        """What turns media files into patches and frames of the size this model reads."""
        return media_processor(self.config)

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of the chat template that hold for every conversation."""
        return {"enable_thinking": True} if self.thinking else {}

    def files(self, source: str) -> SourceFiles:
        """The files of records that a source names. Raises `SourceError` if there are none."""
        return source_files(source, RECORDS)

    def settings(self) -> str:
        """All that the tokens depend on besides the contents of files, as a text for the cache's key."""
        sees = self.config.vision is not None
        settings = f"{NEWEST}/{template_size(self.config)}/{self.flags}/{self.sequence_length}/{sees}"
        most = "" if self.max_media_tokens is None else f"/{self.max_media_tokens} of media"
        return f"{settings}/{self.processor}/{self.shape}/{self.on_long}{most}"

    def make_tokenizer(self, reading: Reading) -> Tokenizer:
        """The model's own tokenizer. Raises `ConfigError` without one, since none is trained for conversations."""
        if self.tokenizer is None:
            raise ConfigError(
                "data.format=chat needs a tokenizer; set data.tokenizer, or model.weights to a folder with one."
            )
        return load_tokenizer(self.tokenizer)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises `UserError` if the tokenizer and the model disagree on the ids of media tokens."""
        check_media_tokens(tokenizer, self.config)

    def documents(self, tokenizer: Tokenizer, reading: Reading) -> Iterator[Document]:
        """Conversations as tokens, cut to whole turns where they are too long; `reading` learns what was left out."""
        files = enumerate(reading.files, start=reading.first)
        batches = ((root, found) for root, path in files for found in records_of(path, reading))
        work, workers = _Work(self, tokenizer, reading.corpus), reading.workers
        for documents, part in in_order(work, batches, reading.check_stop, workers):
            reading.add(part)
            yield from documents


class _Work:
    """Makes documents of records: a callable, so that other processes can do it."""

    def __init__(self, format: ChatFormat, tokenizer: Tokenizer, corpus: Path | None) -> None:
        self.format, self.tokenizer, self.corpus = format, tokenizer, corpus
        self.measured = _Measured(format.processor, format.config, corpus)

    def __call__(self, task: tuple[int, Batch]) -> tuple[list[Document], Reading]:
        """The documents of records of the file that has this number, and what was counted."""
        root, batch = task
        reading, chats = Reading([]), list[_Chat]()
        for where, value in batch.values(reading):
            with reading.forgiving():
                item = parse_line(keep_media(value, self.corpus), where, self.format.shape)
                chats.append(self._open(item, batch.path.parent.absolute(), root))
                add(reading.counts.shapes, [item.shape])
        self.measured.fill((file.kind, file.path) for chat in chats for file in chat.files)
        reading.media |= {file.path.resolve() for chat in chats for file in chat.files}
        tokens = _tokens(chats, self.measured, self.tokenizer, reading)
        return list(_fitting(tokens, self.format, reading)), reading

    def _open(self, item: Conversation | PlainText, folder: Path, root: int) -> _Chat:
        if isinstance(item, PlainText):
            return _Chat(item)
        rendered = item.render(template_size(self.format.config), **self.format.flags)
        with located(item.where):
            kinds = [kind for kind, _, _ in rendered.media]
            names = media_paths(item.messages, kinds, Path())
        paths = [placed(str(name), folder, self.corpus) for name in names]
        files = [_File(*file, root) for file in zip(kinds, paths, map(str, names), strict=True)]
        return _Chat(item, rendered, files)


class _File(NamedTuple):
    """A media part: the file, its path as the line has it, and the number of the file that holds the line."""

    kind: str
    path: Path
    name: str
    root: int


@dataclass(frozen=True)
class _Chat:
    """A line on its way to tokens; `rendered` is none for a plain text."""

    item: Conversation | PlainText
    rendered: Rendered | None = None
    files: Sequence[_File] = ()


class _Measured:
    """Sizes and digests of media files, each read once by a process; by all processors where no other uses them."""

    def __init__(self, processor: MediaProcessor, config: Gemma4Config, corpus: Path | None) -> None:
        self.processor, self.config, self.corpus = processor, config, corpus
        self._found: dict[tuple[str, Path], tuple[MediaItem, str] | UserError] = {}

    def fill(self, wanted: Iterable[tuple[str, Path]]) -> None:
        """Read what is wanted and not known yet."""
        new = [key for key in dict.fromkeys(wanted) if key not in self._found]
        if len(new) > 1 and not in_worker():
            with ThreadPoolExecutor() as pool:
                self._found.update(zip(new, pool.map(self._read, new), strict=True))
        else:
            self._found.update((key, self._read(key)) for key in new)

    def __call__(self, file: _File) -> tuple[MediaItem, str]:
        """Size and digest of a file. Raises the `UserError` with which it could not be read."""
        found = self._found[file.kind, file.path]
        if isinstance(found, UserError):
            raise found
        return found

    def _read(self, key: tuple[str, Path]) -> tuple[MediaItem, str] | UserError:
        try:
            return measure(*key, self.processor, self.config), digest(key[1])
        except UserError as error:
            return UserError(str(error).replace(f"{self.corpus}/", ""))  # a folder that goes, if this is refused


def _tokens(
    chats: Sequence[_Chat], measured: _Measured, tokenizer: Tokenizer, reading: Reading
) -> Iterator[tuple[_Chat, Encoded, list[tuple[MediaItem, str]]]]:
    """Tokens and media of each line that has any, in order; the texts of conversations are tokenised together."""
    ready: list[tuple[_Chat, Rendered | None, list[tuple[MediaItem, str]]]] = []
    for chat in chats:
        with reading.forgiving(), located(chat.item.where):
            media = [measured(file) for file in chat.files]
            expanded = None if chat.rendered is None else expand(chat.rendered, [item for item, _ in media])
            if expanded is not None:
                check_text(expanded.text)
            ready.append((chat, expanded, media))
    texts = [expanded.text for _, expanded, _ in ready if expanded is not None]
    encodings = iter(tokenise_all(texts, tokenizer, control_tokens=True))
    for chat, expanded, media in ready:
        encoded = None
        with reading.forgiving(), located(chat.item.where):
            if isinstance(chat.item, PlainText):
                encoded = encode_text(chat.item.text, tokenizer)
            elif expanded is not None:
                encoded = marked(expanded, next(encodings), tokenizer)
        if encoded is not None:
            yield chat, encoded, media


def _fitting(
    lines: Iterable[tuple[_Chat, Encoded, list[tuple[MediaItem, str]]]], format: ChatFormat, reading: Reading
) -> Iterator[Document]:
    """Documents of at most a sequence's tokens, of the lines in which something is learned."""
    counts, length = reading.counts, format.sequence_length
    for chat, encoded, media in lines:
        add(counts.keys, chat.item.unused)
        add(counts.media, (note for item, _ in media for note in item.notes))
        if not any(encoded.supervised):
            counts.unsupervised += 1
            continue
        soft_tokens = [item.num_tokens for item, _ in media]
        most = sum(soft_tokens) if format.max_media_tokens is None else format.max_media_tokens
        room = min(length, _media_end(encoded, soft_tokens, most))
        if len(encoded.ids) > room and format.on_long == "refuse":
            more = f"{len(encoded.ids):,} tokens, more than data.sequence_length={length}"
            if sum(soft_tokens) > most:
                more = f"{sum(soft_tokens):,} soft tokens of media, more than data.max_media_tokens={most}"
            reading.bad(f"{chat.item.where} has {more}")
            continue
        fitting = None
        if len(encoded.ids) <= room or format.on_long == "cut":
            with suppress(ConversationError):
                fitting = truncate(encoded, room)
        if fitting is None:
            counts.too_many_media += room < min(length, len(encoded.ids))
            counts.too_long += room == min(length, len(encoded.ids))
            continue
        counts.kept += 1
        counts.cut += len(fitting.ids) < len(encoded.ids)
        files = [
            MediaFile(item.kind, file.name, *span, item.num_tokens, len(item.lengths), sha256, file.root)
            for file, span, (item, sha256) in zip(chat.files, encoded.media, media, strict=True)
        ]
        contents = _contents(chat.item, [sha256 for _, sha256 in media])
        yield Document(fitting.ids, runs(fitting.supervised), files[: len(fitting.media)], content_hash=contents)


def _media_end(encoded: Encoded, soft_tokens: Sequence[int], most: int) -> int:
    """Tokens before the first part of media with which there are more than `most` soft tokens; else all."""
    totals = zip(encoded.media, accumulate(soft_tokens), strict=True)
    return next((start for (start, _), total in totals if total > most), len(encoded.ids))


def _contents(item: Conversation | PlainText, media: Sequence[str]) -> int:
    """The hash of a text, or of messages and the digests of their media."""
    if isinstance(item, PlainText):
        return hash_of(item.text)
    messages = [message | {"content": _placeless(message["content"])} for message in item.messages]
    return hash_of(json.dumps([messages, item.tools], sort_keys=True), *media)


def _placeless(content: Any) -> Any:
    """A message's content without the places of its media, which may move."""
    if not isinstance(content, list):
        return content
    return [{key: value for key, value in part.items() if key != "path"} for part in content]


def runs(flags: list[bool]) -> list[list[int]]:
    """Start and stop of each run that is set."""
    edges = np.flatnonzero(np.diff([False, *flags, False]))
    return edges.reshape(-1, 2).tolist()
