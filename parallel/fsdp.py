"""FSDP2: parameters, gradients and optimizer state sharded over all ranks that do not split them in another way.

| unit                                                   | why                                              |
|--------------------------------------------------------|--------------------------------------------------|
| each decoder layer                                     | gathered for its own forward and backward        |
| (tables of `embedding_shards`: none)                   | their rows are exchanged one by one              |
| each layer of the image and audio towers               | as a decoder layer                               |
| the rest of each tower, and each projector             | only batches with its media touch it             |
| root: token table (= tied head), norms, projections    | used first and last, so gathered throughout      |

Within a unit each parameter goes over its own mesh (see `parallel.mesh.Mesh`). A unit's
collectives need every rank, so a rank without images runs the tower on none of them when another
rank has some (`train.engine.media_of_all_ranks`).
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
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from model import Gemma4
from model.encoders.config import ENCODER_MODULES, LAYER_STACKS
from model.precision import accumulation_dtype
from parallel.mesh import Mesh
from parallel.options import ParallelConfig
from parallel.torch_private import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult


def shard(
    model: Gemma4, mesh: Mesh, options: ParallelConfig, compute_dtype: torch.dtype, elsewhere: set[nn.Parameter]
) -> None:
    """Shard a model, or one stage of it, in place; the parameters `elsewhere` are sharded already.

    Gradients are summed, not averaged: the trainer divides the loss by the global token count.
    """
    masters = accumulation_dtype(compute_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != masters else None,
        reduce_dtype=masters,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.whole.device_type == "cuda") if options.cpu_offload else OffloadPolicy()
    whole, split, experts = (_info(mesh.fsdp(m)) for m in (mesh.whole, mesh.split, mesh.experts))

    to_place, placed = set(model.parameters()) - elsewhere, set()

    def place(parameter: nn.Parameter) -> ShardPlacementResult:
        placed.add(parameter)
        if not isinstance(parameter, DTensor):
            return ShardPlacementResult(Shard(shard_axis(parameter.shape, whole.shard_mesh_size)), whole)
        info = split if parameter.device_mesh.mesh_dim_names == ("tp",) else experts
        return ShardPlacementResult(Shard(even_axis(parameter, info.shard_mesh_size)), info)

    def unit(module: nn.Module, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=mesh.fsdp(mesh.whole),
            reshard_after_forward=reshard,
            shard_placement_fn=place,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=elsewhere,
        )

    for layer in model.layers:
        unit(layer, options.reshard_after_forward)
    for path in (*(f"{stack}.layers" for stack in LAYER_STACKS), *ENCODER_MODULES):
        if hasattr(model, path.partition(".")[0]):
            module = model.get_submodule(path)
            for part in module.children() if path.endswith(".layers") else (module,):
                unit(part, options.reshard_after_forward)
    unit(model, False)
    assert placed == to_place, "a parameter is in no unit, or in two"
    register_fsdp_forward_method(model, "run")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def shard_axis(shape: torch.Size, shards: int) -> int:
    """The axis over which FSDP shards a whole parameter: the first, or of a stack of matrices one that is even.

    128 experts over 256 ranks would leave half of them without any, and pad what is gathered to twice the size.
    """
    if len(shape) < 3:
        return 0
    return next((axis for axis, size in enumerate(shape) if size % shards == 0), 0)


def even_axis(parameter: DTensor, shards: int) -> int:
    """The axis that FSDP shards of a parameter which another plan splits.

    Along the axis that plan splits, shards must be even: torch places uneven ones wrongly. A
    legal layout (`parallel.layout.problem`) has one that is.
    """
    (placement,) = parameter.placements
    taken, parts = placement.dim, parameter.device_mesh.size()  # type: ignore[attr-defined]
    axis = 0 if taken != 0 or parameter.shape[0] % (parts * shards) == 0 else 1
    assert axis == 0 or parameter.shape[1] % shards == 0, f"{list(parameter.shape)} over {parts} x {shards} ranks"
    return axis


def _info(mesh: DeviceMesh) -> FSDPMeshInfo:
    return FSDPMeshInfo(mesh, shard_mesh_dim=0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, 1, 0)


def require_gradient_sync(model: nn.Module, required: bool) -> None:
    """Whether the next backward reduces gradients or keeps them for the following micro-batch.

    Encoders always reduce. The following micro-batch might not touch them, and FSDP2 then cannot reduce what a unit has
    kept; nor can it reduce kept gradients, which are float32, together with those of parameters that have kept none.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(required)
    for name, module in model.named_children():
        if name in ENCODER_MODULES and isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(True)
