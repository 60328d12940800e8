"""All that is used of torch without being documented, read at torch 2.13.0.

An upgrade that takes any of it away fails in tests/parallel/test_torch_private.py, under its name.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = [
    "FSDPMeshInfo",
    "HSDPMeshInfo",
    "ShardPlacementResult",
    "TorchDispatchMode",
    "accumulate_gradients",
    "compute_local_shape_and_global_offset",
    "default_store",
    "global_offset",
    "own_store",
    "tree_iter",
]


def own_store() -> dist.Store:
    """A connection of its own to the store of all ranks, for a thread beside one that may be waiting.

    Any store has `clone`, which torch's type stubs do not know.
    """
    store: Any = default_store()
    return store.clone()


def global_offset(tensor: DTensor) -> tuple[int, ...]:
    """Where this rank's part of a tensor begins in the whole."""
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def default_store() -> dist.Store:
    """The store by which the processes found each other. Raises `ValueError` before they have."""
    return dist.distributed_c10d._get_default_store()


def accumulate_gradients(module: FSDPModule) -> None:
    """Add up in float32 what the unsharded parameters of one FSDP unit have as gradients, as behind a backward."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()
