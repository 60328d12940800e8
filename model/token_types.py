"""What a token stands for: text, or a part of an image, a video frame or a sound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.config import Gemma4Config

TEXT, IMAGE, VIDEO, AUDIO = range(4)
"""Token types, as the released processors number them."""


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
