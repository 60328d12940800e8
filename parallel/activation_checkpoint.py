"""Recompute activations in the backward, by torchtitan's policies, in layers of decoder and towers."""

from __future__ import annotations

from torch import nn

from model import Gemma4
from model.media_config import AudioConfig, VisionConfig


def apply_activation_checkpoint(model: Gemma4, mode: str, every: int = 1) -> None:
    """mode: none | full (whole layers) | selective (keep attention and every second product); in every n-th layer.

    Gradients do not change: keys and values shared by layers are layer outputs, and the choice
    of experts is kept, not made again.
    """
    if mode == "none":
        return
    # imports slowly, so only when asked for
    from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, SelectiveAC

    policy: ActivationCheckpointing = FullAC(FullAC.Config(preserve_rng_state=False))
    if mode == "selective":
        options = SelectiveAC.Config(preserve_rng_state=False, force_recompute_mm_shapes_by_fqns=[])
        policy = SelectiveAC(options)
    stacks: list[nn.Module] = [model.language_model]
    if isinstance(model.config.vision, VisionConfig):
        stacks.append(model.vision_tower.encoder)
    if isinstance(model.config.audio, AudioConfig):
        stacks.append(model.audio_tower)
    for stack in stacks:
        layers = stack.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        chosen = nn.Module()
        chosen.layers = nn.ModuleList(layers[::every])
        policy.apply(chosen)
        for index, wrapped in zip(range(0, len(layers), every), chosen.layers, strict=True):
            layers[index] = wrapped
