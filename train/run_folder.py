"""The run folder: made, locked against a second job, and told what it holds."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from model import ConfigError
from train.config import Config
from train.files import replace_file

log = logging.getLogger("gemwright")

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunFolder:
    """`run.dir` with its `checkpoints/`. Rank 0 holds a lock until the process ends."""

    def __init__(self, config: Config, rank: int) -> None:
        """Raises `ConfigError` if the folder cannot be made or another job trains in it."""
        self.path = Path(config.run.dir)
        self.checkpoints = self.path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / ".lock") if rank == 0 else None
        except BlockingIOError:
            raise ConfigError(
                f"another job trains in run.dir={self.path} ({_owner(self.path / '.lock')}); stop it first, or choose "
                "another run.dir."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir={self.path} cannot be used ({error.strerror}); choose a folder you may write to."
            ) from None

    def describe(self, config: Config, tokenizer_json: Path) -> None:
        """Write `config.yaml` and `tokenizer.json`, whole or not at all. For rank 0."""
        replace_file(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        replace_file(self.path / "tokenizer.json", tokenizer_json.read_text(encoding="utf-8"))


def _locked(path: Path) -> IO[str]:
    """The file, locked by this process: a lock that no forked worker inherits, and that ends with the process.

    Raises `BlockingIOError` if another process holds it. A file system without locks gives a warning.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from None
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: the file system has no locks, so a second job in this folder would not be noticed", path)
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    file.flush()
    return file


def _owner(path: Path) -> str:
    """Who holds the lock, by what it wrote there."""
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"
