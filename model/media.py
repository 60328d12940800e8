"""What a batch holds besides tokens: patches of images and frames of sound, and where their soft tokens go.

Everything is laid end to end without padding, in the order of the placeholders in the batch (docs/gemma4.md 8.4).
T counts patches or frames; C numbers make a patch, F a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.errors import UserError
from model.media_config import VisionConfig

if TYPE_CHECKING:
    from model.config import Gemma4Config

TEXT, IMAGE, VIDEO, AUDIO = range(4)
"""Token types, as the released processors number them."""


class MediaError(UserError):
    """An image, video or sound that cannot be used, or does not fit its tokens."""


@dataclass(frozen=True)
class Patches:
    """Patches of images and video frames, and their (x, y) in the image; `lengths` counts patches per image.

    The patches that one soft token pools lie together, soft tokens in reading order; `rows` are
    the flat places [B * S] of the soft tokens.
    """

    values_TC: Tensor
    positions_T2: Tensor
    lengths: tuple[int, ...]
    rows: Tensor

    def to(self, device: torch.device) -> Patches:
        values, positions, rows = (
            t.to(device, non_blocking=True) for t in (self.values_TC, self.positions_T2, self.rows)
        )
        return Patches(values, positions, self.lengths, rows)


@dataclass(frozen=True)
class Frames:
    """Log-mel or waveform frames of clips; `lengths` counts frames per clip, `rows` are as in `Patches`."""

    values_TF: Tensor
    lengths: tuple[int, ...]
    rows: Tensor

    def to(self, device: torch.device) -> Frames:
        values, rows = (t.to(device, non_blocking=True) for t in (self.values_TF, self.rows))
        return Frames(values, self.lengths, rows)


@dataclass(frozen=True)
class Media:
    """Images (video frames included) and sound of a batch."""

    vision: Patches | None = None
    audio: Frames | None = None

    def to(self, device: torch.device) -> Media:
        return Media(
            None if self.vision is None else self.vision.to(device),
            None if self.audio is None else self.audio.to(device),
        )

    @staticmethod
    def on_all_ranks(media: Media | None, config: Gemma4Config, *, vision: bool, audio: bool) -> Media | None:
        """Media with empty parts for what some other rank has, so that all ranks run the same encoders."""
        have = media or Media()
        nothing = torch.zeros(0, dtype=torch.long)
        return Media(
            pack_patches(config, (), nothing) if vision and have.vision is None else have.vision,
            pack_frames(config, (), nothing) if audio and have.audio is None else have.audio,
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
        vision_rows = is_vision(types_BS).flatten().nonzero()[:, 0]
        audio_rows = (types_BS == AUDIO).flatten().nonzero()[:, 0]
        vision = pack_patches(config, images, vision_rows) if images else None
        audio = pack_frames(config, clips, audio_rows) if clips else None
        _check_count("image and video", len(vision_rows), num_vision_tokens(config, vision))
        _check_count("audio", len(audio_rows), num_audio_tokens(config, audio))
        return cls(vision, audio)


def token_types(config: Gemma4Config, tokens: Tensor) -> Tensor:
    """0 text, 1 image, 2 video, 3 audio for each token; begin and end tokens are text."""
    types = torch.zeros_like(tokens)
    if config.vision is not None:
        types = types.masked_fill(tokens == config.image_token_id, IMAGE)
        types = types.masked_fill(tokens == config.video_token_id, VIDEO)
    if config.audio is not None:
        types = types.masked_fill(tokens == config.audio_token_id, AUDIO)
    return types


def is_vision(types: Tensor) -> Tensor:
    """Where a token stands for a part of an image or video frame."""
    return (types == IMAGE) | (types == VIDEO)


def pack_patches(config: Gemma4Config, images: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Patches:
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
        most = vision.position_embedding_size if isinstance(vision, VisionConfig) else vision.mm_posemb_size
        if len(positions_T2) != len(patches_TC) or not 0 <= int(positions_T2.min()) <= int(positions_T2.max()) < most:
            raise MediaError(f"an image needs one position for each patch, from 0 to {most - 1} along each side.")
        order = _pooled_order(positions_T2, vision.pooling_kernel_size if vision.patches_per_token > 1 else 1)
        values.append(patches_TC[order])
        positions.append(positions_T2[order])
    empty = (torch.zeros(0, vision.patch_width), torch.zeros(0, 2, dtype=torch.long))
    return Patches(torch.cat((empty[0], *values)), torch.cat((empty[1], *positions)), tuple(map(len, values)), rows)


def pack_frames(config: Gemma4Config, clips: Sequence[Tensor], rows: Tensor) -> Frames:
    """Clips end to end."""
    audio = config.audio
    if audio is None:
        raise MediaError("this model has no audio encoder; leave sound out or choose a variant with one.")
    for frames_TF in clips:
        if len(frames_TF) == 0 or frames_TF.shape[-1] != audio.frame_width:
            raise MediaError(
                f"a clip has frames {list(frames_TF.shape)}; this model takes frames of {audio.frame_width} numbers."
            )
    return Frames(torch.cat((torch.zeros(0, audio.frame_width), *clips)), tuple(map(len, clips)), rows)


def num_vision_tokens(config: Gemma4Config, patches: Patches | None) -> int:
    return 0 if patches is None or config.vision is None else len(patches.values_TC) // config.vision.patches_per_token


def num_audio_tokens(config: Gemma4Config, frames: Frames | None) -> int:
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
