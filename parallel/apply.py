"""The order in which plans are laid over a model, and nothing else."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from model import Gemma4, Gemma4Config
from model.init import Fill
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.embedding_shards import shard_embedding_rows
from parallel.fsdp import shard
from parallel.initialise import initialise


def build_parallel_model(
    config: Gemma4Config,
    mesh: DeviceMesh,
    device: torch.device,
    fill: Fill,
    *,
    frozen: tuple[str, ...] = (),
    compute_dtype: torch.dtype = torch.float32,
    activation_checkpoint: str = "none",
    activation_checkpoint_every: int = 1,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> Gemma4:
    """A model on `meta`, then row-sharded tables, activation checkpointing, FSDP2, then storage and values.

    frozen: names of top modules that are not trained.
    """
    with torch.device("meta"):
        model = Gemma4(config)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    sharded_rows = shard_embedding_rows(model, mesh, compute_dtype)
    apply_activation_checkpoint(model, activation_checkpoint, activation_checkpoint_every)
    shard(
        model,
        mesh,
        compute_dtype=compute_dtype,
        ignored=sharded_rows,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
    )
    initialise(model, device, fill, offloaded=cpu_offload)
    return model
