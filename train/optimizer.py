"""AdamW: matrices decay; norms, scalars and embedding tables do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from train.config import OptimizerConfig

_TABLES = ("embed_tokens", "position_embedding_table", "pos_embedding")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    groups: dict[object, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() < 2 or any(table in name for table in _TABLES)
            # One call of the fused kernel takes parameters of one mesh and placement.
            where = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            decay = 0.0 if plain else config.weight_decay
            groups.setdefault((decay, where), {"params": [], "weight_decay": decay})["params"].append(parameter)
    optimizer = torch.optim.AdamW(
        list(groups.values()), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
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
