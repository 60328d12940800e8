"""AdamW: matrices decay; norms, scalars and embedding tables do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from parallel.dtensors import local_part
from train.config import OptimizerConfig

_TABLES = ("embed_tokens", "position_embedding_table", "pos_embedding")


class ShardedAdamW(torch.optim.AdamW):
    """AdamW of sharded parameters, by one fused kernel over what this rank holds of them.

    The update is by element, so that no plan needs to know of it; given the sharded tensors, torch would first
    derive, for every list of them, what one kernel over all ranks means.
    """

    def _init_group(self, group: dict[str, Any], params: list[Any], grads: list[Any], *states: list[Any]) -> bool:
        has_complex = super()._init_group(group, params, grads, *states)
        for parameter, grad in zip(params, grads, strict=True):
            if isinstance(parameter, DTensor):
                assert grad.placements == parameter.placements and grad.device_mesh == parameter.device_mesh
        for tensors in (params, grads, *states):
            tensors[:] = map(local_part, tensors)
        return has_complex


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.dim() < 2 or any(table in name for table in _TABLES)
            (plain if is_plain else decayed).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if parameters
    ]
    optimizer = ShardedAdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    _allocate(optimizer)
    return optimizer


def _allocate(optimizer: torch.optim.AdamW) -> None:
    """State of every trained parameter now, as AdamW itself makes it at a first gradient.

    An encoder that no batch has touched yet would have none, and a checkpoint's keys would depend on the data.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
