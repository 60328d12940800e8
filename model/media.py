"""What a batch holds besides tokens: patches of images and frames of sound, and where their soft tokens go.

Everything is laid end to end without padding, in the order of the placeholders in the batch (docs/gemma4.md 8.4).
T counts patches or frames; C numbers make a patch, F a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.encoders.clips import Clips
from model.encoders.config import AudioConfig
from model.errors import UserError
from model.masks import AttentionMask, segment_mask
from model.token_types import AUDIO, is_vision, token_types

if TYPE_CHECKING:
    from model.config import Gemma4Config


class MediaError(UserError):
    """An image, video or sound that cannot be used, or does not fit its tokens."""


@dataclass(frozen=True)
class Places:
    """Where soft tokens go: `index` are flat places of the batch, in the order of the soft tokens.

    `chosen` are the soft tokens that go there, None for all of them; others go to another device.
    """

    index: Tensor
    chosen: Tensor | None = None

    def moved(self, local: Tensor) -> Places:
        """The places that are on this device, given each one's place here, or -1."""
        here = (local >= 0).nonzero()[:, 0]
        return Places(local[here], here if self.chosen is None else self.chosen[here])

    def put(self, x_TD: Tensor, soft_tokens: Tensor) -> Tensor:
        """x with soft tokens in their places, unscaled (docs/gemma4.md 8.4)."""
        chosen = soft_tokens if self.chosen is None else soft_tokens[self.chosen]
        return x_TD.index_copy(0, self.index, chosen.to(x_TD.dtype))

    def to(self, device: torch.device) -> Places:
        """The same places with their indices on a device."""
        chosen = None if self.chosen is None else self.chosen.to(device, non_blocking=True)
        return Places(self.index.to(device, non_blocking=True), chosen)


@dataclass(frozen=True)
class Patches:
    """Patches of images and video frames, and their (x, y) in the image; `lengths` counts patches per image.

    The patches that one soft token pools lie together, soft tokens in reading order; each sees its image by `mask`.
    """

    values_TC: Tensor
    positions_T2: Tensor
    lengths: tuple[int, ...]
    mask: AttentionMask
    places: Places

    def to(self, device: torch.device) -> Patches:
        """The same patches on a device, with their mask."""
        values, positions = (t.to(device, non_blocking=True) for t in (self.values_TC, self.positions_T2))
        return Patches(values, positions, self.lengths, self.mask.to(device), self.places.to(device))


@dataclass(frozen=True)
class Frames:
    """Log-mel or waveform frames of clips; `lengths` counts frames per clip, which `clips` tells apart in a tower."""

    values_TF: Tensor
    lengths: tuple[int, ...]
    clips: Clips | None
    places: Places

    def to(self, device: torch.device) -> Frames:
        """The same frames on a device, with the layout of their clips."""
        clips = None if self.clips is None else self.clips.to(device)
        return Frames(self.values_TF.to(device, non_blocking=True), self.lengths, clips, self.places.to(device))


@dataclass(frozen=True)
class Media:
    """Images (video frames included) and sound of a batch."""

    vision: Patches | None = None
    audio: Frames | None = None

    def to(self, device: torch.device) -> Media:
        """The same media on a device."""
        return Media(
            None if self.vision is None else self.vision.to(device),
            None if self.audio is None else self.audio.to(device),
        )

    def placed(self, local: Callable[[Tensor], Tensor]) -> Media:
        """The same media, of whose soft tokens some go here; `local` gives a place of the batch as one here, or -1."""
        vision, audio = self.vision, self.audio
        return Media(
            None if vision is None else replace(vision, places=vision.places.moved(local(vision.places.index))),
            None if audio is None else replace(audio, places=audio.places.moved(local(audio.places.index))),
        )

    @classmethod
    def build(
        cls,
        config: Gemma4Config,
        tokens_BS: Tensor,
        images: Sequence[tuple[Tensor, Tensor]] = (),
        clips: Sequence[Tensor] = (),
    ) -> Media:
        """Pack images, as (patches [T, C], positions [T, 2]) row by row, and clips, as frames [T, F].

        Both in the order of their tokens in the batch, video frames among the images. Raises
        `MediaError` if the number of soft tokens is not that of the placeholders.
        """
        types_BS = token_types(config, tokens_BS)
        vision_places = is_vision(types_BS).flatten().nonzero()[:, 0]
        audio_places = (types_BS == AUDIO).flatten().nonzero()[:, 0]
        vision = pack_patches(config, images, vision_places) if images else None
        audio = pack_frames(config, clips, audio_places) if clips else None
        _check_count("image and video", len(vision_places), num_vision_tokens(config, vision))
        _check_count("audio", len(audio_places), num_audio_tokens(config, audio))
        return cls(vision, audio)


def pack_patches(config: Gemma4Config, images: Sequence[tuple[Tensor, Tensor]], places: Tensor) -> Patches:
    """Images end to end, the patches of each soft token brought together."""
    vision = config.vision
    if vision is None:
        raise MediaError("this model has no vision encoder; leave images and videos out or choose a variant with one.")
    values, positions = [], []
    for patches_TC, positions_T2 in images:
        misfit = len(patches_TC) % vision.patches_per_token
        if len(patches_TC) == 0 or patches_TC.shape[-1] != vision.patch_width or misfit:
            raise MediaError(
                f"an image has patches {list(patches_TC.shape)}; this model takes a multiple of "
                f"{vision.patches_per_token} patches of {vision.patch_width} numbers."
            )
        most = vision.num_positions
        if len(positions_T2) != len(patches_TC) or not 0 <= int(positions_T2.min()) <= int(positions_T2.max()) < most:
            raise MediaError(f"an image needs one position for each patch, from 0 to {most - 1} along each side.")
        order = _pooled_order(positions_T2, vision.pooling_kernel_size if vision.patches_per_token > 1 else 1)
        values.append(patches_TC[order])
        positions.append(positions_T2[order])
    empty = (torch.zeros(0, vision.patch_width), torch.zeros(0, 2, dtype=torch.long))
    lengths = tuple(map(len, values))
    return Patches(
        torch.cat((empty[0], *values)),
        torch.cat((empty[1], *positions)),
        lengths,
        segment_mask(lengths),
        Places(places),
    )


def pack_frames(config: Gemma4Config, clips: Sequence[Tensor], places: Tensor) -> Frames:
    """Clips end to end."""
    audio = config.audio
    if audio is None:
        raise MediaError("this model has no audio encoder; leave sound out or choose a variant with one.")
    for frames_TF in clips:
        if len(frames_TF) == 0 or frames_TF.shape[-1] != audio.frame_width:
            raise MediaError(
                f"a clip has frames {list(frames_TF.shape)}; this model takes frames of {audio.frame_width} numbers."
            )
    values_TF, lengths = torch.cat((torch.zeros(0, audio.frame_width), *clips)), tuple(map(len, clips))
    in_tower = Clips.of(lengths, audio) if isinstance(audio, AudioConfig) else None
    return Frames(values_TF, lengths, in_tower, Places(places))


def num_vision_tokens(config: Gemma4Config, patches: Patches | None) -> int:
    """Soft tokens of all images and video frames together; 0 without any."""
    return 0 if patches is None or config.vision is None else len(patches.values_TC) // config.vision.patches_per_token


def num_audio_tokens(config: Gemma4Config, frames: Frames | None) -> int:
    """Soft tokens of all clips together; 0 without any."""
    return 0 if frames is None or config.audio is None else sum(map(config.audio.num_tokens, frames.lengths))


def _pooled_order(positions_T2: Tensor, kernel: int) -> Tensor:
    x, y = positions_T2.unbind(dim=-1)
    width = int(x.max()) // kernel + 1 if len(x) else 1
    return torch.argsort(x // kernel + width * (y // kernel), stable=True)


def _check_count(kind: str, placeholders: int, features: int) -> None:
    if placeholders != features:
        raise MediaError(
            f"{placeholders} {kind} tokens in the batch, but its media make {features}; "
            "expand each placeholder to as many tokens as its media give."
        )
