"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from model import ConfigError
from train.config import ScheduleConfig, TrainConfig

DEFAULT_STEPS = 100


def run_length(train: TrainConfig, sequences_per_epoch: int, sequences: int | None = None) -> int:
    """Optimizer steps of a run: `train.steps`, or as many as use the data `train.epochs` times; of both, the fewer.

    sequences: how many there are, if not any number; without steps and epochs the run then ends with them. Raises
    `ConfigError` where there are too few.
    """
    lengths = [] if train.steps is None else [train.steps]
    if train.epochs is not None:
        lengths.append(math.ceil(train.epochs * sequences_per_epoch / train.global_batch_size))
    if sequences is None:
        return min(lengths, default=DEFAULT_STEPS)
    most = sequences // train.global_batch_size
    if most < min(lengths, default=1):
        raise ConfigError(
            f"epochs and max_tokens of data.sources leave {sequences:,} sequences, enough for {most} steps and not for "
            f"{min(lengths, default=1)}; raise them, or set train.steps={max(most, 1)}."
        )
    return min([*lengths, most])


def check_schedule(config: ScheduleConfig, steps: int) -> None:
    """Raises `ConfigError` where warm-up and decay take more steps than the run has."""
    tail = (config.decay_steps or 0) if config.name == "wsd" else 0
    if (config.warmup_steps or 0) + tail > steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.warmup_steps} and decay take more than the {steps} steps of the run; "
            f"largest legal warm-up: {max(steps - tail, 0)}."
        )


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Rate of step `step` (0-based) of `steps`.

    Linear warm-up to the peak, then constant, linear or cosine to `final_lr_ratio` of it, or
    (wsd) constant with a linear tail of `decay_steps`.
    """
    warmup = min(2000, steps // 20) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.name == "constant":
        return peak
    decay = steps - warmup
    if config.name == "wsd":
        decay = min(decay, round(0.15 * steps) if config.decay_steps is None else config.decay_steps)
    left = min(1.0, (steps - 1 - step) / max(1, decay))
    if config.name == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return peak * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)
