"""All that is integer about a batch, made once, before the model and on the CPU.

The model reads these facts and finds out none of its own: no layer builds a mask or looks for the positions to keep.
A plan that deals tokens to ranks makes other `Inputs` of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from model.config import Gemma4Config, LayerType
from model.masks import AttentionMask, layer_masks
from model.media import Media
from model.token_types import TEXT, token_types

Masks = dict[LayerType, AttentionMask]


@dataclass(frozen=True)
class Kept:
    """The positions whose output is wanted (supervised ones, in training): the others are pruned, late in the model.

    `index` are their sorted places among the batch's tokens, the first `count` of them real, since a plan may repeat
    the last one to have a number that divides; `masks` have these queries alone.
    """

    index: Tensor
    count: int
    masks: Masks

    def take(self, x_TD: Tensor) -> Tensor:
        """The rows of kept positions, in order."""
        return x_TD[self.index]

    def to(self, device: torch.device) -> Self:
        """The same positions with index and masks on a device."""
        return replace(self, index=self.index.to(device, non_blocking=True), masks=_masks_on(self.masks, device))


@dataclass(frozen=True)
class Inputs:
    """What the model runs on: `batch_size` sequences of `length` tokens, laid end to end.

    In `tokens_T` padding stands for the soft tokens of `media`.
    """

    tokens_T: Tensor
    positions_T: Tensor
    masks: Masks
    kept: Kept | None
    media: Media | None
    batch_size: int
    length: int

    def prepared(self) -> Inputs:
        """The same inputs, with all made that attention needs to know on the host."""
        masks = [*self.masks.values()]
        if self.kept is not None:
            masks += self.kept.masks.values()
        if self.media is not None and self.media.vision is not None:
            masks.append(self.media.vision.mask)
        for mask in masks:
            mask.prepared()
        return self

    def to(self, device: torch.device) -> Inputs:
        """The inputs on a device, prepared."""
        return replace(
            self,
            tokens_T=self.tokens_T.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
            masks=_masks_on(self.masks, device),
            kept=None if self.kept is None else self.kept.to(device),
            media=None if self.media is None else self.media.to(device),
        )


def make_inputs(
    config: Gemma4Config,
    tokens_BS: Tensor,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    supervised: Tensor | None = None,
    media: Media | None = None,
    masks: Masks | None = None,
) -> Inputs:
    """Inputs of a batch as `Gemma4.forward` takes it; `masks` other than those of whole sequences are for decoding."""
    batch_size, length = tokens_BS.shape
    types_BS = token_types(config, tokens_BS)
    if positions is None:
        positions = torch.arange(length, device=tokens_BS.device).expand(batch_size, length)
    if masks is None:
        masks = layer_masks(config, types_BS, document_ids)
    return Inputs(
        tokens_BS.masked_fill(types_BS != TEXT, config.pad_token_id).flatten(),
        positions.flatten(),
        masks,
        None if supervised is None else keep(masks, supervised.flatten().nonzero()[:, 0]),
        media,
        batch_size,
        length,
    )


def keep(masks: Masks, index: Tensor) -> Kept:
    """The positions at some places of a batch with these masks."""
    return Kept(index, len(index), {layer_type: mask.select(index) for layer_type, mask in masks.items()})


def _masks_on(masks: Masks, device: torch.device) -> Masks:
    return {layer_type: mask.to(device) for layer_type, mask in masks.items()}
