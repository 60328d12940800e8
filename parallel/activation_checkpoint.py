"""Recompute activations in the backward: whole decoder layers, by torchtitan's policy."""

from __future__ import annotations

from model import Gemma4


def apply_activation_checkpoint(model: Gemma4, mode: str) -> None:
    """mode: none | full. Gradients do not change: keys and values shared by layers are layer outputs."""
    if mode == "full":
        from torchtitan.distributed.activation_checkpoint import (
            FullAC,
        )  # imports slowly, so only when asked for

        FullAC(FullAC.Config(preserve_rng_state=False)).apply(model.language_model)
