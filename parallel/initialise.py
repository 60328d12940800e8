"""Give a sharded model that was built on `meta` its storage and initial values, each rank its own slices."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model import Gemma4
from model.init import init_slice_, initialised_tensors


def initialise(model: Gemma4, device: torch.device, seed: int, *, offloaded: bool = False) -> None:
    """The same values as `Gemma4.init_weights` in one process, whatever the mesh.

    Offloaded parameters live on the CPU; buffers are always where the computation is.
    """
    config = model.config
    model.to_empty(device="cpu" if offloaded else device)
    for name, tensor in initialised_tensors(model):
        name = name.replace("_checkpoint_wrapped_module.", "")
        local, offset = tensor.data, (0,) * tensor.dim()
        if isinstance(tensor, DTensor):
            _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            local = tensor.to_local()
        init_slice_(local, name, tensor.shape, offset, seed, config.initializer_range, config.pad_token_id)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
