"""Images, videos and sounds made ready for the model: values, positions and placeholder text (docs/gemma4.md 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from data.media.audio import HOP, log_mel, waveform_frames
from data.media.images import BUDGETS, cut_patches
from data.media.read import (
    SAMPLING_RATE,
    AudioSource,
    ImageSource,
    VideoSource,
    read_audio,
    read_image,
    read_video,
    source_name,
)
from data.tokenizer import MEDIA_TOKENS
from model.media import MediaError

BEGIN_IMAGE, BEGIN_AUDIO, IMAGE, AUDIO, END_IMAGE, END_AUDIO, VIDEO = MEDIA_TOKENS
MEL_FRAMES_PER_TOKEN = 4
"""The audio tower halves time twice, rounding up."""


@dataclass(frozen=True)
class MediaItem:
    """One image, video or sound, without padding.

    values     float32 [T, F]: patches of an image, of a video's frames end to end, or frames of a sound.
    positions  int64 [T, 2] (x, y) of each patch in its image; [0, 2] for a sound.
    lengths    rows of `values` in each image, video frame or sound.
    num_tokens media tokens in `placeholder`: soft tokens the encoder must yield.
    placeholder the text that takes the place of the single media token in a rendered chat.
    """

    kind: Literal["image", "video", "audio"]
    placeholder: str
    values: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    num_tokens: int
    notes: tuple[str, ...] = ()
    """What was left out of the file, in a few words without numbers, to be counted over all files."""

    @property
    def images(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(patches [T, C], positions [T, 2]) of the image, or of each frame of the video."""
        if self.kind == "audio":
            return ()
        return tuple(zip(self.values.split(self.lengths), self.positions.split(self.lengths), strict=True))

    @property
    def clips(self) -> tuple[Tensor, ...]:
        """Frames [T, F] of the sound."""
        return (self.values,) if self.kind == "audio" else ()


@dataclass(frozen=True)
class MediaProcessor:
    """What one variant makes of its media.

    image_tokens   most soft tokens an image takes, video_tokens most that a frame takes; each one of `BUDGETS`.
    num_frames     most frames taken from a video.
    merged         12B: a patch spans what is otherwise pooled, 48 x 48 x 3 values, and is one token.
    audio_features "mel" (E2B, E4B), "waveform" (12B), None (variants that hear nothing).

    Raises `MediaError` for a setting that is not legal.
    """

    patch_size: int = 16
    pooling_kernel_size: int = 3
    image_tokens: int = 280
    video_tokens: int = 70
    num_frames: int = 32
    merged: bool = False
    audio_features: Literal["mel", "waveform"] | None = "mel"

    def __post_init__(self) -> None:
        for name in ("image_tokens", "video_tokens"):
            budget = getattr(self, name)
            if budget not in BUDGETS:
                best = min(BUDGETS, key=lambda legal: abs(legal - budget))
                raise MediaError(f"{name}={budget} is not a budget Gemma 4 knows; nearest of {BUDGETS}: {best}.")
        if self.num_frames < 1:
            raise MediaError(f"num_frames={self.num_frames} leaves nothing of a video; give 1 or more.")
        if self.audio_features not in ("mel", "waveform", None):
            raise MediaError(f"audio_features={self.audio_features!r} is unknown; give 'mel', 'waveform' or None.")

    def image(self, source: ImageSource) -> MediaItem:
        """A path, PIL image or uint8 array [H, W], [H, W, 3] or [H, W, 4]. Raises `MediaError` if it cannot be read."""
        picture, notes = read_image(source)
        values, positions = self._patches(picture, self.image_tokens)
        tokens = self._tokens(values)
        text = f"{BEGIN_IMAGE}{IMAGE * tokens}{END_IMAGE}"
        return MediaItem("image", text, values, positions, (len(values),), tokens, notes)

    def video(self, source: VideoSource) -> MediaItem:
        """A path, or (uint8 frames [N, H, W, 3], frames per second). Raises `MediaError` if it cannot be read.

        Each frame is stamped with its time, "mm:ss" (docs/gemma4.md 10.2).
        """
        frames, notes = read_video(source, self.num_frames)
        parts = [self._patches(Image.fromarray(picture), self.video_tokens) for _, picture in frames]
        tokens = [self._tokens(values) for values, _ in parts]
        text = " ".join(
            f"{timestamp(seconds)} {BEGIN_IMAGE}{VIDEO * count}{END_IMAGE}"
            for (seconds, _), count in zip(frames, tokens, strict=True)
        )
        values, positions = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return MediaItem("video", text, values, positions, tuple(len(v) for v, _ in parts), sum(tokens), notes)

    def audio(self, source: AudioSource) -> MediaItem:
        """A path, or (float array [samples], sampling rate in Hz); cut at 30 seconds.

        Raises `MediaError` if it cannot be read, is too short for one token, or if the variant hears nothing.
        """
        if self.audio_features is None:
            raise MediaError("this variant hears nothing; choose E2B, E4B or 12B, or leave the audio out.")
        waveform, notes = read_audio(source)
        if self.audio_features == "waveform":
            values = waveform_frames(waveform)
            tokens = len(values)
        else:
            values = log_mel(waveform)
            tokens = -(-len(values) // MEL_FRAMES_PER_TOKEN)
        if not tokens:
            raise MediaError(
                f"{source_name(source, 'waveform')} has {len(waveform)} samples at {SAMPLING_RATE} Hz, too few for one "
                f"audio token; give at least {HOP + 1}."
            )
        text = f"{BEGIN_AUDIO}{AUDIO * tokens}{END_AUDIO}"
        return MediaItem("audio", text, values, torch.zeros(0, 2, dtype=torch.int64), (len(values),), tokens, notes)

    def _patches(self, image: Image.Image, budget: int) -> tuple[Tensor, Tensor]:
        cell = self.patch_size * self.pooling_kernel_size
        return cut_patches(image, budget, cell, cell if self.merged else self.patch_size)

    def _tokens(self, patches: Tensor) -> int:
        return len(patches) if self.merged else len(patches) // self.pooling_kernel_size**2


def timestamp(seconds: float) -> str:
    """mm:ss, rounded down; minutes run on past 99."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
