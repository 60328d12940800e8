"""Objectives: `objective(model, batch) -> Loss`, sums over supervised tokens; the trainer divides by their number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from data.batch import Batch
from model import Gemma4


@dataclass(frozen=True)
class Loss:
    """`total` is differentiable; `nll` is what is reported as the loss; metrics are sums like it."""

    total: Tensor
    nll: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """`sums`: names of the sums a `Loss` of it holds, the same on every rank."""

    @property
    def sums(self) -> tuple[str, ...]: ...

    def __call__(self, model: Gemma4, batch: Batch) -> Loss: ...


def cross_entropy(model: Gemma4, batch: Batch, z_loss: float = 0.0) -> Loss:
    """Next-token cross entropy, for pretraining and fine-tuning alike."""
    supervised = batch.supervised_BS
    hidden_TD = model(
        batch.tokens_BS,
        positions=batch.positions_BS,
        document_ids=batch.document_ids_BS,
        supervised=supervised,
        media=batch.media,
        masks=batch.masks,
    )
    sums = model.head(hidden_TD, model.head_weight, batch.labels_BS[supervised], z_loss=z_loss)
    return Loss(sums.total, sums.nll, supervised.sum(), {"z": sums.z} if z_loss else {})


@dataclass(frozen=True)
class CrossEntropy:
    """`cross_entropy` with its options."""

    z_loss: float = 0.0

    @property
    def sums(self) -> tuple[str, ...]:
        return ("loss", "count", "z") if self.z_loss else ("loss", "count")

    def __call__(self, model: Gemma4, batch: Batch) -> Loss:
        return cross_entropy(model, batch, self.z_loss)
