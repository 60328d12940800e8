"""What encoders take of media files, kept on disk as it was made, so that a file is decoded once and not every epoch.

A file of the cache is named by all that its contents follow from: the digest of the medium, the settings of the
processor, and the libraries that decode and scale. It is safetensors with a checksum behind, written aside and moved
into place whole. Pixels are kept as the bytes that they were, a quarter of their numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.media.images import from_bytes, to_bytes
from data.media.process import MediaItem, MediaProcessor

log = logging.getLogger("gemwright")

_VERSION = 1
"""Goes up when the same file gets other values."""
_LIBRARIES = f"Pillow {PIL.__version__}, PyAV {av.__version__}, NumPy {np.__version__}"
_CHECKSUM_BYTES = 4
_unwritten: set[Path] = set()
"""Caches that could not be written to, of which this process has told."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder of processed media, which any number of processes may share."""

    folder: Path

    def item(self, kind: str, sha256: str, processor: MediaProcessor, make: Callable[[], MediaItem]) -> MediaItem:
        """What the processor makes of the file with this digest: read from here, or made and kept."""
        name = hashlib.sha256(f"{_VERSION}/{kind}/{sha256}/{processor}/{_LIBRARIES}".encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.features"
        try:
            return _unpacked(path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("%s is damaged (%s) and made anew", path, error)
        item = make()
        try:
            _write(path, _packed(item))
        except OSError as error:
            if self.folder not in _unwritten:
                log.warning("features of media cannot be kept in %s (%s)", self.folder, error.strerror)
            _unwritten.add(self.folder)
        return item

    def size(self) -> tuple[int, int]:
        """How many files it holds, and their bytes."""
        sizes = [file.stat().st_size for file in self.folder.glob("??/*.features")]
        return len(sizes), sum(sizes)


def _packed(item: MediaItem) -> bytes:
    facts = {name: getattr(item, name) for name in ("kind", "placeholder", "lengths", "num_tokens", "notes")}
    tensors = {
        "facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8),
        "values": item.values if item.kind == "audio" else to_bytes(item.values),
        "positions": item.positions.to(torch.int16),
    }
    contents: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return contents + zlib.crc32(contents).to_bytes(_CHECKSUM_BYTES, "little")


def _unpacked(written: bytes) -> MediaItem:
    """The item that was packed, every bit of it. Raises `ValueError` or `SafetensorError` for other bytes."""
    contents, checksum = written[:-_CHECKSUM_BYTES], written[-_CHECKSUM_BYTES:]
    if zlib.crc32(contents).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise ValueError("another checksum")
    tensors: dict[str, Tensor] = load(contents)
    facts = json.loads(tensors["facts"].numpy().tobytes())
    values = tensors["values"] if facts["kind"] == "audio" else from_bytes(tensors["values"])
    facts |= {"lengths": tuple(facts["lengths"]), "notes": tuple(facts["notes"])}
    return MediaItem(values=values, positions=tensors["positions"].to(torch.int64), **facts)


def _write(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=".making-")  # others may write the same
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
        os.chmod(aside, 0o644)  # others may share the cache; temporary files are private
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
