"""The run folder: made, locked against a second job, and told what it holds."""

from __future__ import annotations

import fcntl
from pathlib import Path

from omegaconf import OmegaConf

from model import ConfigError
from train.config import Config
from train.files import replace_file


class RunFolder:
    """`run.dir` with its `checkpoints/`. Rank 0 holds a lock until the process ends."""

    def __init__(self, config: Config, rank: int) -> None:
        """Raises `ConfigError` if the folder cannot be made or another job trains in it."""
        self.path = Path(config.run.dir)
        self.checkpoints = self.path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                self._lock = (self.path / ".lock").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another job trains in run.dir={self.path}; stop it first, or choose another run.dir."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir={self.path} cannot be used ({error.strerror}); choose a folder you may write to."
            ) from None

    def describe(self, config: Config, tokenizer_json: Path) -> None:
        """Write `config.yaml` and `tokenizer.json`, whole or not at all. For rank 0."""
        replace_file(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        replace_file(self.path / "tokenizer.json", tokenizer_json.read_text(encoding="utf-8"))
