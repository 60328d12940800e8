"""The global gradient norm over parameters that live on different meshes, and clipping by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a global 2-norm of at most `max_norm`; returns the norm before.

    torch's own clipping refuses to mix meshes, so each (mesh, placement) group is measured apart.
    """
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            groups[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(parameter)
    norms = []
    for group in groups.values():
        norm = get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total
