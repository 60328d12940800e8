"""Recompute activations in the backward: whole layers of decoder and towers, by torchtitan's policy."""

from __future__ import annotations

from model import Gemma4
from model.media_config import AudioConfig, VisionConfig


def apply_activation_checkpoint(model: Gemma4, mode: str) -> None:
    """mode: none | full. Gradients do not change: keys and values shared by layers are layer outputs."""
    if mode == "full":
        from torchtitan.distributed.activation_checkpoint import (
            FullAC,
        )  # imports slowly, so only when asked for

        policy = FullAC(FullAC.Config(preserve_rng_state=False))
        policy.apply(model.language_model)
        if isinstance(model.config.vision, VisionConfig):
            policy.apply(model.vision_tower.encoder)
        if isinstance(model.config.audio, AudioConfig):
            policy.apply(model.audio_tower)
