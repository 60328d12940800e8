"""Where the frames of sound clips lie: all that is integer about them, for every layer of the audio tower.

Letters of this file: N clips, T frames of a clip or soft tokens of all of them; in attention B blocks of W, the
window, and C = 2 W keys of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.encoders.config import AudioConfig


@dataclass(frozen=True)
class Clips:
    """Clips of any length laid end to end, as frames and, a quarter as many, as soft tokens.

    Attention takes soft tokens in B blocks of one window of W against contexts of C = 2 W: key j of a
    context lies i + W - j tokens before query i. Convolution over time takes them with a gap of zeros before
    each clip, which stands for its left padding.
    """

    count: int
    longest: int
    """Frames of the longest clip, to which the first convolutions pad each clip."""
    frames: Tensor
    """Place of each frame among the padded ones."""
    halves_NT: Tensor
    """Which frames are real after one halving."""
    tokens: Tensor
    """Places of the soft tokens among the padded ones."""
    distance_WC: Tensor
    visible_BWC: Tensor
    """Keys of the window that belong to the query's clip; a padded query sees itself."""
    place_T: Tensor
    """Where each soft token lies among the gaps, and the length of it all."""
    spread: int

    @classmethod
    def of(cls, lengths: Sequence[int], config: AudioConfig) -> Clips:
        """Clips of so many frames each."""
        frames = torch.tensor(lengths, dtype=torch.long)
        halves, sizes = (frames + 1) // 2, ((frames + 1) // 2 + 1) // 2
        longest, total = max(lengths, default=1), int(sizes.sum())
        halved = (longest + 1) // 2
        start_T = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        clip_T = torch.arange(len(lengths)).repeat_interleave(sizes)
        token_T = torch.arange(total)
        W, gap = config.window, config.conv_kernel_size - 1
        distance_WC = torch.arange(W)[:, None] + W - torch.arange(2 * W)[None, :]
        reach_BW = F.pad(token_T - start_T, (0, -total % W)).view(-1, W)
        return cls(
            count=len(lengths),
            longest=longest,
            frames=_real(frames, longest).flatten().nonzero()[:, 0],
            halves_NT=_real(halves, halved),
            tokens=_real(sizes, (halved + 1) // 2).flatten().nonzero()[:, 0],
            distance_WC=distance_WC,
            visible_BWC=(distance_WC >= 0) & (distance_WC < W) & (distance_WC <= reach_BW[:, :, None]),
            place_T=token_T + gap * (clip_T + 1),
            spread=total + gap * max(len(lengths), 1) + 1,
        )

    def to(self, device: torch.device) -> Clips:
        """The same layout with its indices and masks on a device."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        return replace(
            self,
            frames=moved(self.frames),
            halves_NT=moved(self.halves_NT),
            tokens=moved(self.tokens),
            distance_WC=moved(self.distance_WC),
            visible_BWC=moved(self.visible_BWC),
            place_T=moved(self.place_T),
        )


def _real(lengths: Tensor, longest: int) -> Tensor:
    """Bool [N, longest]: which of the padded places a clip fills."""
    return torch.arange(longest)[None, :] < lengths[:, None]
