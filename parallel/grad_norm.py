"""The global gradient norm over parameters that live on different meshes and stages, and clipping by it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from parallel.dtensors import local_part


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, *, counted_elsewhere: Collection[Tensor] = ()
) -> float:
    """Scale gradients in place to a global 2-norm of at most `max_norm`; returns the norm before.

    Collective over all ranks: each adds the squares of what it holds, over the number of ranks
    that hold the same. `counted_elsewhere`: copies of parameters that another stage counts.
    """
    grads = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    held: dict[int, list[Tensor]] = defaultdict(list)
    for parameter, grad in grads.items():
        if not any(parameter is other for other in counted_elsewhere):
            held[num_holders(grad)].append(local_part(grad))
    squares = sum(float(get_total_norm(parts)) ** 2 / holders for holders, parts in held.items())
    total = torch.tensor(squares, dtype=torch.float64)
    dist.all_reduce(total)
    norm = math.sqrt(float(total))
    if norm > max_norm:
        for grad in grads.values():
            local_part(grad).mul_(max_norm / (norm + 1e-6))
    return norm


def num_holders(grad: Tensor) -> int:
    """How many ranks hold the same part of a gradient."""
    if not isinstance(grad, DTensor):
        return dist.get_world_size()
    mesh = grad.device_mesh
    return math.prod(mesh.size(dim) for dim, placement in enumerate(grad.placements) if placement == Replicate())
