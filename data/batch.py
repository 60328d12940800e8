"""What the model trains on: rows, stacked into batches; labels are already shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Gemma4Config
from model.config import LayerType
from model.masks import AttentionMask
from model.media import Media

IGNORE = -100
"""Label of a position that is not supervised."""


@dataclass(frozen=True)
class Row:
    """One sequence: integer tensors [S], and its media in the order of their tokens.

    `images` (video frames among them) are (patches [T, C], positions [T, 2]); `clips` are frames [T, F].
    """

    tokens_S: Tensor
    labels_S: Tensor
    positions_S: Tensor
    document_ids_S: Tensor
    images: tuple[tuple[Tensor, Tensor], ...] = ()
    clips: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Integer tensors [B, S]. A document is a run of equal document ids; positions restart in each.

    `masks` are set where the batch holds a part of each sequence only; otherwise the model makes them.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    document_ids_BS: Tensor
    media: Media | None = None
    masks: dict[LayerType, AttentionMask] | None = None

    @property
    def supervised_BS(self) -> Tensor:
        return self.labels_BS != IGNORE

    def to(self, device: torch.device) -> Batch:
        parts = {name: getattr(self, name) for name in ("tokens_BS", "labels_BS", "positions_BS", "document_ids_BS")}
        moved = {name: part.to(device, non_blocking=True) for name, part in parts.items()}
        media = None if self.media is None else self.media.to(device)
        masks = None if self.masks is None else {kind: mask.to(device) for kind, mask in self.masks.items()}
        return Batch(**moved, media=media, masks=masks)


def collate(rows: Sequence[Row], config: Gemma4Config) -> Batch:
    """Stack rows and pack their media. Raises `MediaError` if media and placeholders do not match."""
    tokens, labels, positions, documents = (
        torch.stack([getattr(row, name) for row in rows])
        for name in ("tokens_S", "labels_S", "positions_S", "document_ids_S")
    )
    images = [image for row in rows for image in row.images]
    clips = [clip for row in rows for clip in row.clips]
    media = Media.build(config, tokens, images, clips) if images or clips else None
    return Batch(tokens, labels, positions, documents, media)
