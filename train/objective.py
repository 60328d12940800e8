"""Objectives: what is minimised, given the hidden states of a batch.

`objective(hidden_TD, head, weight_VD, batch) -> Loss` gives sums over units (supervised tokens here; pairs where two
answers are compared), and the trainer divides by the number of units in the global batch. So the number is the same
for every mesh and accumulation. An objective never calls the model, and is the same with and without a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from data.batch import Batch
from model import Gemma4
from model.head import Head

if TYPE_CHECKING:
    from train.config import TrainConfig


@dataclass(frozen=True)
class Loss:
    """Sums over units: `total` is differentiable; `nll` is reported as the loss, over `count`; so are the metrics."""

    total: Tensor
    nll: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    nll_T: Tensor | None = None
    """Its part of each supervised position, where units are positions."""

    def sums(self) -> dict[str, Tensor]:
        """What is reported, by name, in float64."""
        parts = {"loss": self.nll, "count": self.count, **self.metrics}
        return {name: part.detach().double() for name, part in parts.items()}


class Objective(Protocol):
    """What the trainer needs of an objective."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of the sums in a `Loss` of it, the same on every rank: loss, count, then those of its metrics."""
        ...

    def units(self, batch: Batch) -> int:
        """How many units a batch has, of all its positions, on the CPU. Ranks add theirs up and divide by the sum."""
        ...

    def __call__(self, hidden_TD: Tensor, head: Head, weight_VD: Tensor, batch: Batch) -> Loss:
        """The loss of supervised positions: their hidden states in order, and the output head with its table."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross entropy, for pretraining and fine-tuning alike."""

    z_loss: float = 0.0

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of what is reported; z, the squared log-sum-exp, where it has a coefficient."""
        return ("loss", "count", "z") if self.z_loss else ("loss", "count")

    def units(self, batch: Batch) -> int:
        """How many supervised tokens a batch has."""
        return batch.kept.count

    def __call__(self, hidden_TD: Tensor, head: Head, weight_VD: Tensor, batch: Batch) -> Loss:
        """Sums over the supervised positions, by the head's fused loss."""
        sums = head(hidden_TD, weight_VD, batch.labels_T, z_loss=self.z_loss)
        metrics = {"z": sums.z} if self.z_loss else {}
        return Loss(sums.total, sums.nll, torch.tensor(batch.kept.count), metrics, sums.nll_T)


OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {"cross_entropy": lambda train: CrossEntropy(train.z_loss)}
"""What makes the objective of each name that `train.objective` takes."""


def cross_entropy(model: Gemma4, batch: Batch, z_loss: float = 0.0) -> Loss:
    """The loss of a batch on a model that lies whole on one device."""
    return CrossEntropy(z_loss)(model.run(batch.inputs), model.head, model.head_weight, batch)
