"""Tokenised conversations on disk: a shard of their tokens, and a line of JSON for each with all else about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chat_media import MediaFile
from data.conversation import Encoded
from data.shards import TokenShard, add_facts, damaged, write_shard

_DETAILS, _ENDS = "details.jsonl", "details.npy"


@dataclass
class Counts:
    """What became of the conversations of a source."""

    kept: int = 0
    cut: int = 0
    """Conversations that were kept, but lost turns at the end."""
    too_long: int = 0
    """Left out: nothing supervised in the turns that fit."""
    unsupervised: int = 0
    """Left out: nothing supervised at all."""

    def __str__(self) -> str:
        left_out = f"{self.too_long} too long, {self.unsupervised} with nothing supervised"
        return f"{self.kept} conversations, {self.cut} of them cut; left out: {left_out}"


@dataclass(frozen=True)
class Chat:
    """A tokenised conversation of N tokens; `supervised` [N] is not shifted, `media` in the order of the tokens."""

    ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    media: list[MediaFile]


def write_chats(
    folder: Path, chats: Iterable[tuple[Encoded, list[MediaFile]]], vocab_size: int, counts: Counts
) -> None:
    """Write to an existing folder, one conversation at a time; `counts` is read when all are written."""
    ends = [0]

    def tokens() -> Iterator[list[int]]:
        for encoded, media in chats:
            line = {"supervised": _runs(encoded.supervised), "media": [asdict(file) for file in media]}
            ends.append(ends[-1] + details.write(json.dumps(line).encode() + b"\n"))
            yield encoded.ids

    with (folder / _DETAILS).open("wb") as details:
        write_shard(folder, tokens(), vocab_size)
    np.save(folder / _ENDS, np.asarray(ends, dtype=np.int64))
    add_facts(folder, counts=asdict(counts))


class ChatShard(TokenShard):
    """Read access to written conversations. Raises `ShardError` if files are missing or sizes disagree."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            self.counts = Counts(**self.meta["counts"])
            self._ends: NDArray[np.int64] = np.load(folder / _ENDS)
            self._details = np.memmap(folder / _DETAILS, dtype=np.uint8, mode="r")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder, f"cannot be read ({error})") from None
        if len(self._ends) != len(self.offsets) or len(self._details) != self._ends[-1]:
            raise damaged(folder, f"has a {_DETAILS} of another size than was written")

    def chat(self, index: int) -> Chat:
        length = self.length(index)
        line: dict[str, Any] = json.loads(bytes(self._details[self._ends[index] : self._ends[index + 1]]))
        supervised = np.zeros(length, dtype=np.bool_)
        for start, stop in line["supervised"]:
            supervised[start:stop] = True
        return Chat(self.document(index, 0, length), supervised, [MediaFile(**file) for file in line["media"]])


def _runs(flags: list[bool]) -> list[list[int]]:
    """Start and end of each run that is set."""
    edges = np.flatnonzero(np.diff([False, *flags, False]))
    return edges.reshape(-1, 2).tolist()
