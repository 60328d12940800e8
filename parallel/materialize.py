"""Give a sharded model that was built on `meta` its storage and values, each rank its own slices."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.utils import canonical_fqn

from model import Gemma4
from model.init import Fill, Slice, initialised_tensors
from parallel.torch_private import global_offset


def materialize(model: Gemma4, device: torch.device, fill: Fill, *, offloaded: bool = False) -> None:
    """`fill` gets this rank's slice of every parameter and persistent buffer, whatever the mesh.

    Offloaded parameters live on the CPU; buffers are always where the computation is.
    """
    model.to_empty(device="cpu" if offloaded else device)
    slices = []
    for name, tensor in initialised_tensors(model):
        local, offset = tensor.data, (0,) * tensor.dim()
        if isinstance(tensor, DTensor):
            local, offset = tensor.to_local(), global_offset(tensor)
        slices.append(Slice(local, canonical_fqn(name), tensor.shape, offset))
    fill(slices)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
