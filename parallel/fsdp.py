"""FSDP2 over the data-parallel axes: parameters, gradients and optimizer state sharded, float32 masters.

| unit                                                   | why                                              |
|--------------------------------------------------------|--------------------------------------------------|
| each decoder layer                                     | gathered for its own forward and backward        |
| (per-layer embedding table: none)                      | its rows are exchanged, see embedding_shards.py  |
| each layer of the image and audio towers               | as a decoder layer                               |
| the rest of each tower                                 | only batches with its media touch it             |
| root: token table (= tied head), norms, projections    | used first and last, so gathered throughout      |

A unit's collectives need every rank, so a rank without images runs the tower on none of them
when another rank has some (`Media.on_all_ranks`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from model import Gemma4
from model.media_config import AudioConfig, VisionConfig

TOWERS = ("vision_tower", "audio_tower")


def shard(
    model: Gemma4,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    ignored: set[nn.Parameter] | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard in place over `dp_shard`, replicate over `dp_replicate`; `ignored` parameters are left as they are.

    Gradients are summed, not averaged: the trainer divides the loss by the global token count.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    dp_mesh = mesh if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]

    def unit(module: nn.Module, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=dp_mesh,
            reshard_after_forward=reshard,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=ignored,
        )

    text = model.language_model
    for layer in text.layers:
        unit(layer, reshard_after_forward)
    if isinstance(model.config.vision, VisionConfig):
        for layer in model.vision_tower.encoder.layers:
            unit(layer, reshard_after_forward)
        unit(model.vision_tower, reshard_after_forward)
    if isinstance(model.config.audio, AudioConfig):
        for layer in model.audio_tower.layers:
            unit(layer, reshard_after_forward)
        unit(model.audio_tower, reshard_after_forward)
    unit(model, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def require_gradient_sync(model: nn.Module, required: bool) -> None:
    """Whether the next backward reduces gradients or keeps them for the following micro-batch.

    Towers always reduce: FSDP2 cannot keep the gradients of a unit that the following micro-batch may not touch.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(required)
    for name, module in model.named_children():
        if name in TOWERS and isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(True)
