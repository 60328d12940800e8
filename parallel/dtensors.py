"""Parameters on `meta` that live sharded over a mesh, as DTensors with only this rank's part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from parallel.torch_private import compute_local_shape_and_global_offset


def sharded_parameter(parameter: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> nn.Parameter:
    """A parameter of the same shape and name on `meta`, of which this rank holds its part."""
    shape = parameter.shape
    local_shape, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    local = torch.empty(local_shape, dtype=parameter.dtype, device="meta")
    whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=parameter.stride())
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter; the gradient goes back to it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
