"""Recompute activations in the backward, by torchtitan's policies, in layers of decoder and towers."""

from __future__ import annotations

from typing import Any

import torch

from model import Gemma4
from model.encoders.config import LAYER_STACKS
from parallel.options import ActivationCheckpointConfig


def apply_activation_checkpoint(model: Gemma4, options: ActivationCheckpointConfig) -> None:
    """Recompute what the options say in the layers of a model, or of one stage of it.

    Gradients do not change: keys and values shared by layers are layer outputs. The choice of experts is
    kept where selective, and made again from the same scores where full.
    """
    if options.mode == "none":
        return
    # imports slowly, so only when asked for
    from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, SelectiveAC

    class Selective(SelectiveAC):
        def get_save_ops(self) -> set[Any]:
            saved: set[Any] = super().get_save_ops()
            attention = getattr(torch.ops.gemwright, "attention", None)  # once Triton's kernels are imported
            return saved if attention is None else saved | {attention.default}

    policy: ActivationCheckpointing = FullAC(FullAC.Config(preserve_rng_state=False))
    if options.mode == "selective":
        policy = Selective(Selective.Config(preserve_rng_state=False, force_recompute_mm_shapes_by_fqns=[]))
    for name in ("language_model", *LAYER_STACKS):
        if not hasattr(model, name.partition(".")[0]):
            continue
        stack = model.get_submodule(name)
        layers = stack.get_submodule("layers")
        kept = {key: layer for key, layer in layers.named_children() if int(key) % options.every}
        policy.apply(stack)  # to all of its `layers`
        for key, layer in kept.items():
            layers.register_module(key, layer)
