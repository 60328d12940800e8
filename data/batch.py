"""What the model trains on: one dataclass, labels already shifted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not supervised."""


@dataclass(frozen=True)
class Batch:
    """Integer tensors [B, S]. A document is a run of equal document ids; positions restart in each."""

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    document_ids_BS: Tensor

    @property
    def supervised_BS(self) -> Tensor:
        return self.labels_BS != IGNORE

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


def collate(sequences: list[Batch]) -> Batch:
    """Stack single sequences, tensors [S], into a batch."""
    return Batch(*(torch.stack(tensors) for tensors in zip(*(vars(s).values() for s in sequences), strict=True)))
