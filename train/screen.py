"""The first screen of a run's log: what model computes how, on what data and for how long, and what it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from data.corpus.mixture import whole_parts
from data.corpus.open import Data
from model import Gemma4
from model.attention_kernels import kernel_for
from model.moe import has_grouped_kernel
from model.precision import accumulation_dtype, multiplies_narrow
from model.triton_choice import triton_takes
from parallel.world import World
from train.footprint import GB, capacity, footprint_of
from train.metrics import duration
from train.resolve import Resolved
from train.resume import Progress

log = logging.getLogger("gemwright")

_MOST_EPOCHS = 4
"""Uses of the same tokens that are nearly as good as fresh ones, in pretraining."""


@dataclass(frozen=True)
class Outlook:
    """What a run begins with: its data, how far it is, the checkpoint that it goes on from, and what changed since."""

    data: Data
    progress: Progress
    checkpoint: Path | None
    changed: list[str]


def show(run: Resolved, world: World, device: torch.device, dtype: torch.dtype, outlook: Outlook) -> None:
    """Log the screen, before anything large is built or read; on the rank that speaks."""
    if not log.isEnabledFor(logging.INFO):
        return
    for line in [*_model(run, world, device, dtype), *_data(run, outlook), *_length(run, outlook)]:
        log.info("%s", line)
    if device.type == "cuda":
        show_memory(run, dtype, torch.cuda.get_device_properties(device).total_memory)


def show_memory(run: Resolved, dtype: torch.dtype, card: int) -> None:
    """Log what a rank will hold of a GPU's bytes, with a warning where it is more than tensors may take."""
    found, room = footprint_of(run, dtype, "cuda"), capacity(card)
    held, most = sum(found.held.values()) / GB, found.peak / GB
    log.info(
        "memory a rank: %.1f GB of weights, gradients and optimizer state, with a step %.1f of %.1f, most in the %s",
        *(held, most, room / GB, found.narrowest),
    )
    if found.peak > room:
        log.warning(
            "memory may not suffice: try parallel.tp, activation_checkpoint.mode=full or a shorter "
            "data.sequence_length; `gemwright memory RANKS KEY=VALUE ...` counts what they need."
        )


def forecast(record: dict[str, Any], steps: int) -> str:
    """When the run will end, by a record of metrics."""
    seconds = record["eta_seconds"]
    end = datetime.now() + timedelta(seconds=seconds)
    left = steps - record["step"]
    return (
        f"expected: {left:,} more steps in {duration(seconds)}, until {end:%Y-%m-%d %H:%M}, besides what saving takes"
    )


def _model(run: Resolved, world: World, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    with torch.device("meta"):
        whole = Gemma4(run.model)
    parameters = sum(p.numel() for p in whole.parameters())
    compute, masters = (str(kind).removeprefix("torch.") for kind in (dtype, accumulation_dtype(dtype)))
    yield (
        f"{run.config.model.weights or run.config.model.name}: {parameters:,} parameters | {world.size} {device.type} "
        f"ranks: {run.layout} | compute {compute}, masters {masters}"
    )
    for name, part in whole.named_children():
        if name != "language_model" and next(part.parameters(), None) is not None:
            yield f"{name}: {'frozen' if name in run.frozen else 'trained'}"
    yield from (f"{name}: frozen" for name in run.frozen if "." in name)


def kernels(run: Resolved, device: torch.device, dtype: torch.dtype, products: str) -> str:
    """A line on what computes attention, experts, loss and matrix products; `products` names the last of these."""
    model, layout = run.model, run.layout
    sliding = sum(kind == "sliding_attention" for kind in model.layer_types)
    local, full = (kernel_for(device.type, width, dtype).__name__ for width in (model.head_dim, model.global_head_dim))
    experts, around = "none", ""
    if layout.cp > 1:
        around = ", whole sequence gathered once" if model.num_kv_shared_layers else ", full layers around a ring"
    if model.enable_moe_block:
        experts = "torch grouped_mm" if has_grouped_kernel(device.type, dtype) else "one after the other"
    if dtype is torch.bfloat16 and not multiplies_narrow(device.type):
        products += ", slow in bfloat16 on this processor: run.dtype=float32 takes a fraction of the time"
    split = f", vocabulary over {layout.tp} ranks" if layout.tp > 1 else ""
    parts = (
        f"attention {local} ({sliding} sliding layers of window {model.sliding_window}), {full} "
        f"({model.num_hidden_layers - sliding} full layers){around}",
        f"experts {experts}",
        f"loss linear cross entropy in tiles{split}",
        f"norms, rotary embedding, gates {'of Triton' if triton_takes(device.type) else 'of torch'}",
        f"products {products}",
        f"activation checkpoint {run.config.activation_checkpoint.mode}",
        f"optimizer {run.config.optimizer.name}, state in {run.config.optimizer.state_dtype}",
    )
    return f"kernels: {' | '.join(parts)}"


def _data(run: Resolved, outlook: Outlook) -> Iterator[str]:
    data, config = outlook.data, run.config
    total = outlook.progress.steps * config.train.global_batch_size
    epochs, counts = data.epochs(total), data.turns.counts(total)
    weights = [whole_parts(stage.weights) for stage in data.turns.stages]
    for number, (source, dataset) in enumerate(zip(data.sources, data.datasets, strict=True)):
        share = ", then ".join(f"{parts[number]} of {sum(parts)}" for parts in weights) + " sequences"
        tokens = f"{counts[number] * dataset.sequence_length:,} tokens"
        mixed = f" | {share}, {tokens} in this run" if len(data.sources) > 1 else ""
        yield f"data: {source.path}: {dataset}{mixed} | {epochs[number]:.2f} epochs in this run"
        if epochs[number] > _MOST_EPOCHS:
            yield (
                f"{source.name} is used {epochs[number]:.1f} times; beyond {_MOST_EPOCHS} repeated tokens teach less "
                "and less (arXiv:2305.16264): take more data, a lower weight, or epochs of its own in data.sources"
            )
    for name, dataset in data.validation.items():
        yield f"never trained on: {name}: {dataset.size}"
    if data.kept_away:
        yield f"not trained on, since data.validation has them too: {data.kept_away:,} documents"


def _length(run: Resolved, outlook: Outlook) -> Iterator[str]:
    train, length, steps = run.config.train, run.config.data.sequence_length, outlook.progress.steps
    accumulation = train.global_batch_size // (run.micro_batch_size * run.layout.dp)
    why = ""
    if train.epochs is not None and train.steps is not None:
        first, other = ("steps", "epochs") if steps == train.steps else ("epochs", "steps")
        why = f" | train.{first} ends it before train.{other}={getattr(train, other):g} would"
    yield (
        f"run: {steps:,} steps of {train.global_batch_size} sequences of {length}, {accumulation} x "
        f"{run.micro_batch_size} a rank | {steps * train.global_batch_size * length:,} tokens in all{why} | "
        f"run folder {run.config.run.dir}"
    )
    if outlook.checkpoint is not None:
        yield f"resumed from {outlook.checkpoint} at step {outlook.progress.step}"
        if outlook.changed:
            yield f"changed since then: {'; '.join(outlook.changed)}"
    elif run.weights is None:
        yield f"starts from drawn weights, run.seed={run.config.run.seed}"
    else:
        yield f"starts from the weights in {run.weights}"
