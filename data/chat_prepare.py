"""Tokenise conversations once and keep the result, beside the names of their media files.

A source is .jsonl of {"messages": [...]}, with "tools" and flags if wanted, or {"text": "..."}. A media part names a
local file, {"type": "image", "path": "cat.png"}; a relative path starts at the folder of its .jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from data.chat import NEWEST
from data.chat_media import MediaFile, check_media_tokens, measure, media_paths, media_processor
from data.chat_shards import ChatShard, Counts, write_chats
from data.conversation import (
    Conversation,
    ConversationError,
    Document,
    Encoded,
    encode,
    encode_text,
    located,
    read_conversations,
    truncate,
)
from data.prepare import Corpus, default_cache, digest_of, made_once
from data.sources import SourceError, source_files
from data.tokenizer import load_tokenizer
from model import Gemma4Config

_FORMAT = 1


@dataclass(frozen=True)
class ChatCorpus(Corpus):
    shard: ChatShard

    @property
    def counts(self) -> Counts:
        return self.shard.counts


def prepare_chats(
    source: str,
    tokenizer: Path,
    *,
    size: str,
    thinking: bool,
    config: Gemma4Config,
    sequence_length: int,
    cache: Path | None = None,
) -> ChatCorpus:
    """The tokenised conversations of a source, from the cache or made now; safe to call from several processes.

    `size` names the template ("small": E2B, E4B; "large": the others), `thinking` turns thinking on in every line.
    A conversation of more than `sequence_length` tokens is cut to whole turns; one with nothing supervised, or only
    beyond that, is left out: `counts` has the numbers. Media files are read one at a time, to learn their sizes.

    Raises `UserError`, with file and line where there is one, for what cannot be read or used, and when no conversation
    remains.
    """
    files = [path for path in source_files(source) if path.suffix == ".jsonl"]
    if not files:
        raise SourceError(f"data.source={source} names no conversations; give a file, a folder or a glob of .jsonl.")
    loaded = load_tokenizer(tokenizer)
    check_media_tokens(loaded, config)
    maker = _Maker(loaded, size, thinking, config, sequence_length)
    places = [str(path.absolute()) for path in files]  # of a link too, as its media lie beside it
    folder = (cache or default_cache()) / "chats" / digest_of(f"{maker.settings}/{places}", tokenizer, files)
    made_once(folder, lambda aside: maker.make(aside, files, source))
    return ChatCorpus(folder, ChatShard(folder), loaded)


class _Maker:
    def __init__(
        self, tokenizer: Tokenizer, size: str, thinking: bool, config: Gemma4Config, sequence_length: int
    ) -> None:
        self.tokenizer, self.size, self.config, self.sequence_length = tokenizer, size, config, sequence_length
        self.flags = {"enable_thinking": True} if thinking else {}
        self.processor = media_processor(config)
        self.counts = Counts()

    @property
    def settings(self) -> str:
        sees = self.config.vision is not None
        return f"{_FORMAT}/{NEWEST}/{self.size}/{self.flags}/{self.sequence_length}/{sees}/{self.processor}"

    def make(self, folder: Path, files: list[Path], source: str) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_chats(folder, self._kept(files), self.tokenizer.get_vocab_size(), self.counts)
        if not self.counts.kept:
            raise SourceError(
                f"data.source={source} leaves nothing to train on ({self.counts}); "
                "give conversations with an assistant, or raise data.sequence_length."
            )

    def _kept(self, files: list[Path]) -> Iterator[tuple[Encoded, list[MediaFile]]]:
        counts = self.counts
        for path in files:
            for item in read_conversations([path]):
                encoded, media = self._encode(item, path.parent.absolute())
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
                yield fitting, media[: len(fitting.media)]

    def _encode(self, item: Conversation | Document, folder: Path) -> tuple[Encoded, list[MediaFile]]:
        if isinstance(item, Document):
            with located(item.where):
                return encode_text(item.text, self.tokenizer), []
        rendered = item.render(self.size, **self.flags)
        with located(item.where):
            kinds = [kind for kind, _, _ in rendered.media]
            paths = media_paths(item.messages, kinds, folder)
            items = [measure(kind, path, self.processor, self.config) for kind, path in zip(kinds, paths, strict=True)]
            encoded = encode(rendered, self.tokenizer, items)
        media = [
            MediaFile(item.kind, str(path), *span, item.num_tokens, len(item.lengths))
            for item, path, span in zip(items, paths, encoded.media, strict=True)
        ]
        return encoded, media
