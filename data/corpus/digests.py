"""Digests of files' contents, by which prepared corpora are named and checked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

INDEX = ".digests.json"


class Digests:
    """SHA-256 of files, read once each: an index tells which bytes were read before.

    A file counts as read if its inode, size, and times of change are those of then, on whichever node it is seen. The
    time at which its inode changed cannot be set by a program, so a file that was written to is read anew, whatever
    its date says.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / INDEX
        self._known = self._read()
        self._new = False

    def of(self, path: Path) -> str:
        """The digest of a file in hexadecimal."""
        key = _identity(path)
        if key not in self._known:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if _identity(path) != key:
                return digest  # it is being written to
            self._known[key], self._new = digest, True
        return self._known[key]

    def save(self) -> None:
        """Keep what was found for the next time. An index that cannot be written costs time and nothing else."""
        if not self._new:
            return
        aside = self.path.with_name(f"{INDEX}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(self._read() | self._known))
            aside.replace(self.path)
        except OSError:
            aside.unlink(missing_ok=True)

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
            return {}
        return found


def _identity(path: Path) -> str:
    status = path.stat()
    return f"{status.st_ino}/{status.st_size}/{status.st_mtime_ns}/{status.st_ctime_ns}"
