"""Folders that are made once and appear whole, by one of all processes that want them, and go on where one was killed.

What is not whole yet lies aside in `.making-NAME`, whose lock its maker holds.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from data.corpus.reading import SourceError, go_on

log = logging.getLogger("gemwright")

_MAKING, _LOCK, _PARTS = ".making-", ".lock", "[0-9]*"
_KEPT_SECONDS = 7 * 24 * 3600
"""How long what a killed process left is kept for it to go on."""
_POLL, _TELL = 0.2, 30.0
"""Seconds between two looks at another maker, and between two lines that say so."""


def made_once(folder: Path, make: Callable[[Path], None], check_stop: Callable[[], None] = go_on) -> None:
    """Unless `folder` is there, have `make` fill one aside and move it into place whole.

    It is empty, or holds what an earlier `make` that was killed or stopped left there with a finished part in it: a
    name that begins with a digit. One process makes it and the others wait; where the file system has no locks, each
    makes its own and the first wins. Raises `SourceError` if nothing can be written there.
    """
    while not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _clear(folder.parent)
            aside, lock = _aside(folder, check_stop)
        except OSError as error:
            raise SourceError(
                f"prepared data cannot be kept in {folder.parent} ({error.strerror}); set data.cache to a folder that "
                "can be written to."
            ) from None
        if lock is not None:
            with lock:
                _fill(folder, aside, make)
            return


def _fill(folder: Path, aside: Path, make: Callable[[Path], None]) -> None:
    go_on_later = True
    try:
        make(aside)
        (aside / _LOCK).unlink()
        aside.chmod(0o755)  # others may share the cache; temporary folders are private
        aside.rename(folder)
    except SourceError:
        go_on_later = False  # the same files would be refused again
        raise
    except OSError:
        if not folder.exists():
            raise
        go_on_later = False
    finally:
        if not go_on_later or not any(aside.glob(_PARTS)):
            shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path, check_stop: Callable[[], None]) -> tuple[Path, TextIO | None]:
    """A folder, and its lock, by which others know that its maker lives; none where another has made it meanwhile."""
    aside = folder.parent / f"{_MAKING}{folder.name}"
    told = 0.0
    while not folder.exists():
        check_stop()
        aside.mkdir(exist_ok=True)
        try:
            lock = (aside / _LOCK).open("a")
        except FileNotFoundError:  # its maker has just moved it into place, or removed it
            continue
        free = _lock(lock.fileno())
        if free is None:
            lock.close()
            aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_MAKING))
            return aside, (aside / _LOCK).open("w")
        if free and _is_at(lock, aside / _LOCK):
            os.utime(aside)
            return aside, lock
        lock.close()
        if not free and time.monotonic() - told > _TELL:
            told = time.monotonic()
            log.info("another process makes %s; waiting for it", folder)
        time.sleep(0 if free else _POLL)
    return aside, None


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one of this path; not once its folder was moved or removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clear(parent: Path) -> None:
    """Remove folders, by a lock file in them ours, whose makers are gone, without a finished part or with old ones."""
    for lock in parent.glob(f"{_MAKING}*/{_LOCK}"):
        try:
            with lock.open("r+") as held:
                old = time.time() - lock.parent.stat().st_mtime > _KEPT_SECONDS
                if (old or not any(lock.parent.glob(_PARTS))) and _lock(held.fileno()):
                    shutil.rmtree(lock.parent)
        except OSError as error:
            log.warning("%s was left by a killed process and cannot be cleared away (%s)", lock.parent, error.strerror)


def _lock(descriptor: int) -> bool | None:
    """Whether this process now holds the lock of a file, not another one; none on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True
