"""What the model trains on: rows, stacked into batches; labels are already shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Gemma4Config
from model.inputs import Inputs, Kept, make_inputs
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
    source: int = 0
    """Which source of a mixture it is of."""


@dataclass(frozen=True)
class Batch:
    """What the model runs on, labels of all positions (`IGNORE` where no output is wanted), and sources of rows."""

    inputs: Inputs
    labels_BS: Tensor
    sources_B: Tensor

    @classmethod
    def make(
        cls,
        config: Gemma4Config,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        document_ids_BS: Tensor,
        media: Media | None = None,
        sources_B: Tensor | None = None,
    ) -> Batch:
        """A batch of integer tensors [B, S]. A document is a run of equal ids; positions restart in each."""
        inputs = make_inputs(config, tokens_BS, positions_BS, document_ids_BS, labels_BS != IGNORE, media)
        return cls(inputs, labels_BS, torch.zeros_like(labels_BS[:, 0]) if sources_B is None else sources_B)

    @property
    def kept(self) -> Kept:
        """The supervised positions."""
        assert self.inputs.kept is not None
        return self.inputs.kept

    @property
    def labels_T(self) -> Tensor:
        """Labels of the supervised positions, in order."""
        return self.labels_BS.flatten()[self.kept.index[: self.kept.count]]

    @property
    def sources_T(self) -> Tensor:
        """Sources of the supervised positions, in order."""
        return self.sources_B[self.kept.index[: self.kept.count] // self.labels_BS.shape[1]]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device, copied without waiting from pinned memory."""
        labels_BS, sources_B = (t.to(device, non_blocking=True) for t in (self.labels_BS, self.sources_B))
        return Batch(self.inputs.to(device), labels_BS, sources_B)


def collate(rows: Sequence[Row], config: Gemma4Config) -> Batch:
    """Stack rows and pack their media. Raises `MediaError` if media and placeholders do not match."""
    tokens, labels, positions, documents = (
        torch.stack([getattr(row, name) for row in rows])
        for name in ("tokens_S", "labels_S", "positions_S", "document_ids_S")
    )
    images = [image for row in rows for image in row.images]
    clips = [clip for row in rows for clip in row.clips]
    media = Media.build(config, tokens, images, clips) if images or clips else None
    sources = torch.tensor([row.source for row in rows])
    batch = Batch.make(config, tokens, labels, positions, documents, media, sources)
    batch.inputs.prepared()  # here, as this may be a worker of the loader
    return batch
