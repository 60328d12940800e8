"""Conversations as a kind of corpus, each a document that is packed whole.

A source is .jsonl of {"messages": [...]}, with "tools" and flags if wanted, or {"text": "..."}. A media part names a
local file, {"type": "image", "path": "cat.png"}; a relative path starts at the folder of its .jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.chat.encode import Encoded, encode, encode_text, truncate
from data.chat.media import media_paths
from data.chat.read import Conversation, ConversationError, PlainText, located, read_conversations
from data.chat.render import NEWEST
from data.chat.template import template_size
from data.corpus.packing import Whole
from data.corpus.shards import Counts, Document
from data.corpus.sources import SourceError, source_files
from data.media.files import MediaFile, check_media_tokens, measure, media_processor
from data.media.process import MediaProcessor
from data.tokenizer import load_tokenizer
from model import ConfigError, Gemma4Config


@dataclass(frozen=True)
class ChatFormat:
    """Conversations as this model reads them; `thinking` turns thinking on in every line.

    A conversation of more than `sequence_length` tokens is cut to whole turns; one with nothing supervised, or only
    beyond that, is left out. Media files are read one at a time, to learn their sizes.
    """

    tokenizer: Path | None
    config: Gemma4Config
    sequence_length: int
    thinking: bool = False
    packing = Whole
    fix = "give conversations with an assistant, or raise data.sequence_length"

    @cached_property
    def processor(self) -> MediaProcessor:
        """What turns media files into patches and frames of the size this model reads."""
        return media_processor(self.config)

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of the chat template that hold for every conversation."""
        return {"enable_thinking": True} if self.thinking else {}

    def files(self, source: str) -> list[Path]:
        """The .jsonl files that a source names. Raises `SourceError` if there are none."""
        files = [path for path in source_files(source) if path.suffix == ".jsonl"]
        if not files:
            raise SourceError(
                f"data.source={source} names no conversations; give a file, a folder or a glob of .jsonl."
            )
        return files

    def settings(self, files: list[Path]) -> str:
        """All that the tokens depend on besides the files' contents, as a text for the cache's key."""
        sees = self.config.vision is not None
        places = [str(path.absolute()) for path in files]  # of a link too, as its media lie beside it
        settings = f"{NEWEST}/{template_size(self.config)}/{self.flags}/{self.sequence_length}/{sees}"
        return f"{settings}/{self.processor}/{places}"

    def make_tokenizer(self, files: list[Path]) -> Tokenizer:
        """The model's own tokenizer. Raises `ConfigError` without one, since none is trained for conversations."""
        if self.tokenizer is None:
            raise ConfigError(
                "data.format=chat needs a tokenizer; set data.tokenizer, or model.weights to a folder with one."
            )
        return load_tokenizer(self.tokenizer)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises `UserError` if the tokenizer and the model disagree on the ids of media tokens."""
        check_media_tokens(tokenizer, self.config)

    def documents(self, files: list[Path], tokenizer: Tokenizer, counts: Counts) -> Iterator[Document]:
        """Conversations as tokens, cut to whole turns where they are too long; `counts` learns what was left out."""
        for path in files:
            for item in read_conversations([path]):
                encoded, media = self._encode(item, tokenizer, path.parent.absolute())
                if not any(encoded.supervised):
                    counts.unsupervised += 1
                    continue
                try:
                    fitting = truncate(encoded, self.sequence_length)
                except ConversationError:
                    counts.too_long += 1
                    continue
                counts.kept += 1
                counts.cut += len(fitting.ids) < len(encoded.ids)
                yield Document(fitting.ids, runs(fitting.supervised), media[: len(fitting.media)])

    def _encode(
        self, item: Conversation | PlainText, tokenizer: Tokenizer, folder: Path
    ) -> tuple[Encoded, list[MediaFile]]:
        if isinstance(item, PlainText):
            with located(item.where):
                return encode_text(item.text, tokenizer), []
        rendered = item.render(template_size(self.config), **self.flags)
        with located(item.where):
            kinds = [kind for kind, _, _ in rendered.media]
            paths = media_paths(item.messages, kinds, folder)
            items = [measure(kind, path, self.processor, self.config) for kind, path in zip(kinds, paths, strict=True)]
            encoded = encode(rendered, tokenizer, items)
        media = [
            MediaFile(item.kind, str(path), *span, item.num_tokens, len(item.lengths))
            for item, path, span in zip(items, paths, encoded.media, strict=True)
        ]
        return encoded, media


def runs(flags: list[bool]) -> list[list[int]]:
    """Start and stop of each run that is set."""
    edges = np.flatnonzero(np.diff([False, *flags, False]))
    return edges.reshape(-1, 2).tolist()
