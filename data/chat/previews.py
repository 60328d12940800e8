"""Media files as a page shows them: small pictures and players inside the page, links to what is too large for it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from data.chat.media import media_paths
from data.chat.read import Conversation, ConversationError
from data.chat.show import StandIn
from data.chat.visible import visible
from data.media.process import MediaProcessor
from data.media.read import read_image
from model.errors import UserError

MAX_BYTES = 4 << 20
"""In a sound or video that is put into the page; a larger one is linked."""
_SIDE = 480
"""Pixels of the longer side of a picture in the page."""
_RIFF, _ISO, _EBML = rb"RIFF....", rb"....ftyp", rb"\x1aE\xdf\xa3"
_TYPES = {
    "audio": {
        _RIFF + rb"WAVE": "audio/wav",
        rb"fLaC": "audio/flac",
        rb"OggS": "audio/ogg",
        rb"ID3|\xff[\xf2\xf3\xfa\xfb]": "audio/mpeg",
        rb"\xff[\xf1\xf9]": "audio/aac",
        _ISO: "audio/mp4",
        _EBML: "audio/webm",
    },
    "video": {_ISO: "video/mp4", _EBML: "video/webm", rb"OggS": "video/ogg"},
}
"""What browsers play, by the first bytes of a file."""


def media_type(kind: str, head: bytes) -> str | None:
    """The MIME type of a sound or video that begins with these bytes; None for one that browsers do not play."""
    return next((name for start, name in _TYPES[kind].items() if re.match(start, head, re.DOTALL)), None)


@dataclass(frozen=True)
class Part:
    """A media part of a conversation, and the text of special tokens that takes its place."""

    kind: str
    placeholder: str
    path: Path | None = None
    name: str = ""
    """The path as the line has it."""
    problem: str = ""
    """Why the file cannot be measured; a stand-in has its place then."""

    def html(self) -> str:
        """The picture or player, or a link."""
        if self.path is None or self.problem:
            return ""
        inside = _picture(self.path) if self.kind == "image" else _player(self.kind, self.path)
        link = f'<a href="{escape(self.path.absolute().as_uri())}">{{}}</a>'
        if self.kind == "image":
            return link.format(inside)
        return inside or link.format(f"{visible(self.path.name)}, {self.path.stat().st_size / 1e6:,.1f} MB")


class Measure:
    """The soft tokens of media files for models of a size, each file read once."""

    def __init__(self, size: str) -> None:
        self.processor = MediaProcessor(audio_features="mel" if size == "small" else "waveform")
        self._found: dict[tuple[str, Path], tuple[str, str]] = {}

    def parts(self, item: Conversation, kinds: Sequence[str], folder: Path) -> list[Part]:
        """The media parts of a conversation, whose text has these kinds; relative paths start at `folder`.

        A part that cannot be measured is a stand-in, with the reason.
        """
        try:
            names = media_paths(item.messages, kinds, Path())
        except ConversationError as error:
            return [Part(kind, StandIn(kind).placeholder, problem=str(error)) for kind in kinds]
        return [self._part(kind, name, folder / name) for kind, name in zip(kinds, names, strict=True)]

    def _part(self, kind: str, name: Path, path: Path) -> Part:
        if (kind, path) not in self._found:
            self._found[kind, path] = self._read(kind, path)
        placeholder, problem = self._found[kind, path]
        return Part(kind, placeholder, path, str(name), problem)

    def _read(self, kind: str, path: Path) -> tuple[str, str]:
        read = {"image": self.processor.image, "audio": self.processor.audio, "video": self.processor.video}
        try:
            return read[kind](path).placeholder, ""
        except (UserError, OSError) as error:
            return StandIn(kind).placeholder, str(error)


def _picture(path: Path) -> str:
    """The picture as the model gets it, upright and over white, made small."""
    picture, _ = read_image(path)
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f'<img src="{_data("image/jpeg", file.getvalue())}" width="{picture.width}" alt="image">'


def _player(kind: str, path: Path) -> str:
    """A player with the file inside; empty for a file that is too large, or that browsers do not play."""
    with path.open("rb") as file:
        found = media_type(kind, file.read(12))
        file.seek(0)
        content = file.read(MAX_BYTES + 1)
    if found is None or len(content) > MAX_BYTES:
        return ""
    return f'<{kind} controls preload="metadata" src="{_data(found, content)}"></{kind}>'


def _data(name: str, content: bytes) -> str:
    return f"data:{name};base64,{base64.b64encode(content).decode()}"
