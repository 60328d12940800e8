"""Where numbers go: files of the run always, Weights & Biases by choice. Rank 0 only."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from model import ConfigError
from train.config import Config, WandbConfig
from train.files import replace_file
from train.records import append, cut, read

_GROUPS = {
    "train": ("loss", "grad_norm", "lr", "z", "supervised_tokens"),
    "progress": ("tokens_seen", "eta_seconds"),
    "memory": ("peak_memory_gib",),
}


class JsonlTracker:
    """Append-only; on resume, lines past the resumed step are dropped, as if they had not been."""

    def __init__(self, folder: Path, first_step: int) -> None:
        names = ("metrics.jsonl", "validation.jsonl", "samples.jsonl")
        self.metrics, self.validation, self.samples = (folder / name for name in names)
        for path in (self.metrics, self.validation, self.samples):
            cut(path, first_step)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        append(self.metrics, metrics)

    def log_validation(self, losses: dict[str, Any]) -> None:
        """Append a line to validation.jsonl."""
        append(self.validation, losses)

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Append a line to samples.jsonl for each text."""
        for sample in samples:
            append(self.samples, sample)

    def finish(self) -> None:
        """Nothing is left open."""


class WandbTracker:
    """One W&B run per run folder: its id is kept there, so a resumed run goes on in the same charts."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        options: WandbConfig = config.trackers.wandb
        id_file = folder / "wandb_run_id.txt"
        if not id_file.exists():
            replace_file(id_file, uuid.uuid4().hex[:8])
        self._wandb = wandb
        try:
            self._run = self._start(config, options, folder, id_file.read_text().strip())
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise ConfigError(
                f"W&B did not start ({str(error).splitlines()[0]}); log in with `wandb login`, "
                "or set trackers.wandb.mode=offline."
            ) from None
        self._run.define_metric("progress/step")
        self._run.define_metric("*", step_metric="progress/step")
        self._rows = [_row(sample) for sample in read(folder / "samples.jsonl")]

    def _start(self, config: Config, options: WandbConfig, folder: Path, run_id: str) -> Any:
        from omegaconf import OmegaConf

        wandb = self._wandb
        return wandb.init(
            id=run_id,
            resume="allow",
            mode=options.mode,
            project=options.project,
            entity=options.entity,
            name=options.name or folder.name,
            group=options.group,
            tags=options.tags,
            dir=folder,
            config=OmegaConf.to_container(OmegaConf.structured(config)),
            settings=wandb.Settings(console="off"),
        )

    def log(self, metrics: dict[str, Any]) -> None:
        """Send a step's numbers, in groups of charts."""
        named = {f"{_group(name)}/{name}": value for name, value in metrics.items() if name != "step"}
        self._send(metrics["step"], named)

    def log_validation(self, losses: dict[str, Any]) -> None:
        """Send the losses on what is held out, as a group of charts."""
        values = {name.replace("validation_loss", "validation/loss"): loss for name, loss in losses.items()}
        self._send(values.pop("step"), values)

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Send generated texts as a table that grows over the run."""
        self._rows += [_row(sample) for sample in samples]
        table = self._wandb.Table(columns=["step", "prompt", "text"], data=self._rows)
        self._send(samples[0]["step"], {"samples/text": table})

    def _send(self, step: int, values: dict[str, Any]) -> None:
        """Under the step's own number, by which the parts of a resumed run sync into one.

        A step that is done again after a resume has the same numbers, and W&B's counter cannot go back to it.
        """
        if step >= self._run.step:
            self._run.log({"progress/step": step, **values}, step=step)

    def finish(self) -> None:
        """Wait until all is sent, and close the run."""
        self._run.finish()


Tracker = JsonlTracker | WandbTracker


def build_trackers(config: Config, folder: Path, first_step: int) -> list[Tracker]:
    """The run's own files, and Weights & Biases if the config wants it."""
    trackers: list[Tracker] = [JsonlTracker(folder, first_step)]
    if config.trackers.wandb.mode != "disabled":
        trackers.append(WandbTracker(config, folder))
    return trackers


def _row(sample: dict[str, Any]) -> list[Any]:
    return [sample["step"], sample.get("prompt"), sample.get("text")]


def _group(name: str) -> str:
    if name.startswith("source_"):
        return "sources"
    return next((group for group, names in _GROUPS.items() if name in names), "speed")
