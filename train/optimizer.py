"""AdamW: matrices decay; norms, scalars and embedding tables do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from parallel.dtensors import local_part
from train.config import OptimizerConfig

_TABLES = ("embed_tokens", "position_embedding_table", "pos_embedding")


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW of sharded parameters, by one fused kernel over what this rank holds of them.

    Each element is updated by itself, so no plan needs to know of it. Given DTensors, torch would first work out,
    at every step and for every list of them, how they are sharded.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.betas, self.eps = (config.beta1, config.beta2), config.eps
        # State of every trained parameter now: an encoder that no batch has touched yet would have none, and a
        # checkpoint's keys would depend on the data.
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            given = [(p, p.grad) for p in group["params"] if p.grad is not None]
            for parameter, grad in given:
                if isinstance(parameter, DTensor):
                    assert grad.placements == parameter.placements and grad.device_mesh == parameter.device_mesh
            states = [self.state[parameter] for parameter, _ in given]
            adamw(
                [local_part(parameter) for parameter, _ in given],
                [local_part(grad) for _, grad in given],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                maximize=False,
            )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> ShardedAdamW:
    """AdamW over what is trained; weight decay is on matrices, not on embedding tables and vectors."""
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
    return ShardedAdamW(groups, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
