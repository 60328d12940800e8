"""Media whose bytes lie inside of a record: written into the folder of the corpus, once each, and named there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

_KEPT = "corpus:"
"""Begins the path of such a file; its place in the folder of the corpus follows."""


def keep_media(value: Any, corpus: Path | None) -> Any:
    """A value of a record in which objects that hold the bytes of a file have its path in the corpus instead.

    Without a folder of a corpus nothing is written, and the paths are the same.
    """
    if isinstance(value, list):
        return [keep_media(item, corpus) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: keep_media(item, corpus) for key, item in value.items()}
    if isinstance(kept.get("bytes"), bytes):
        kept["path"] = _kept(kept.pop("bytes"), corpus)
    return kept


def placed(path: str, folder: Path, corpus: Path | None) -> Path:
    """Where the file of a path lies: in the corpus, or from the folder of the file that names it."""
    return Path(corpus or "", path.removeprefix(_KEPT)) if path.startswith(_KEPT) else folder / path


def _kept(contents: bytes, corpus: Path | None) -> str:
    digest = hashlib.sha256(contents).hexdigest()
    place = f"media/{digest[:2]}/{digest}"
    if corpus is not None and not (corpus / place).exists():
        (corpus / place).parent.mkdir(parents=True, exist_ok=True)
        aside = corpus / f"{place}.{os.getpid()}"  # others may write the same
        aside.write_bytes(contents)
        aside.rename(corpus / place)
    return _KEPT + place
