"""Files that appear whole: written aside, made durable, and moved into place."""

from __future__ import annotations

import errno
import logging
import os
from functools import cache
from pathlib import Path

log = logging.getLogger("gemwright")

_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def replace_file(path: Path, text: str, *, mode: int | None = None) -> None:
    """Give a file this text. Whoever reads it meanwhile, or after a kill, finds all of the old or all of the new."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if mode is not None:
        aside.chmod(mode)
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make durable what was created, renamed or removed in a folder, where its file system can do that for folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
        _warn(os.fstat(descriptor).st_dev)
    finally:
        os.close(descriptor)


@cache
def _warn(device: int) -> None:
    """Once for each file system."""
    log.warning("file system %d cannot make folders durable: a crash of the machine may lose the newest file", device)
