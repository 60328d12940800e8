"""AdamW, or Muon for matrices of layers beside it: matrices decay; norms, scalars and embedding tables do not."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from parallel.dtensors import local_part
from train.config import OptimizerConfig
from train.moments import Moment, as_rows, chunks, is_narrowed, turns
from train.muon import Muon, is_orthogonalised

_TABLES = ("embed_tokens", "position_embedding_table", "pos_embedding")


class ShardedOptimizer(torch.optim.Optimizer):
    """AdamW of sharded parameters, by one fused kernel over what this rank holds of them; Muon for those it takes.

    AdamW updates each element by itself, so no plan needs to know of it. Given DTensors, torch would first work
    out, at every step and for every list of them, how they are sharded.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.lr, "muon": None})
        self.betas, self.eps = (config.beta1, config.beta2), config.eps
        self.narrow: dict[nn.Parameter, tuple[Moment, ...]] = {}
        """Moments that are kept in fewer bits."""
        # State of every trained parameter now: an encoder that no batch has touched yet would have none, and a
        # checkpoint's keys would depend on the data.
        for group in self.param_groups:
            for parameter in group["params"]:
                names = ("exp_avg", "exp_avg_sq") if group["muon"] is None else ("momentum",)
                if is_narrowed(parameter, config.state_dtype):
                    moments = tuple(
                        Moment(parameter, name, config.state_dtype, squares=name == "exp_avg_sq") for name in names
                    )
                    self.narrow[parameter] = moments
                    self.state[parameter] = {name: t for moment in moments for name, t in moment.tensors.items()}
                else:
                    self.state[parameter] = {
                        name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in names
                    }
                if group["muon"] is None or parameter in self.narrow:
                    self.state[parameter]["step"] = torch.zeros((), device=parameter.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is not None and isinstance(parameter, DTensor):
                    assert grad.placements == parameter.placements and grad.device_mesh == parameter.device_mesh
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"] is None:
                self._adamw(group, [parameter for parameter in given if parameter not in self.narrow])
                for parameter in given:
                    if parameter in self.narrow:
                        self._narrow_adamw(group, parameter)
            else:
                for parameter in given:
                    self._look_ahead(parameter, group["muon"].momentum)
                group["muon"].step(group["lr"], group["weight_decay"])

    def _adamw(self, group: dict[str, Any], given: list[nn.Parameter]) -> None:
        states = [self.state[parameter] for parameter in given]
        self._fused(
            group,
            [local_part(parameter) for parameter in given],
            [local_part(parameter.grad) for parameter in given if parameter.grad is not None],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
        )

    def _narrow_adamw(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        """AdamW of some rows after the other, whose moments are wide for that long."""
        assert parameter.grad is not None
        weight, grad = (as_rows(local_part(t)) for t in (parameter, parameter.grad))
        before, moments = self.state[parameter]["step"].clone(), self.narrow[parameter]
        self.state[parameter]["step"] += 1
        for rows in chunks(parameter):
            wide = [moment.read(rows, weight.dtype) for moment in moments]
            self._fused(group, [weight[rows]], [grad[rows]], *([t] for t in (*wide, before.clone())))
            turn = turns(parameter, rows, self.state[parameter]["step"])
            for moment, values in zip(moments, wide, strict=True):
                moment.write(rows, values, turn)

    def _look_ahead(self, parameter: nn.Parameter, decay: float) -> None:
        """Add the gradient to the momentum, and make of it what Muon takes: the momentum, with it added once more."""
        assert parameter.grad is not None
        grad, state = local_part(parameter.grad), self.state[parameter]
        if parameter not in self.narrow:
            momentum = local_part(state["momentum"]).lerp_(grad, 1 - decay)
            grad.lerp_(momentum, decay)
            return
        (moment,), grad = self.narrow[parameter], as_rows(grad)
        state["step"] += 1
        for rows in chunks(parameter):
            momentum = moment.read(rows, grad.dtype).lerp_(grad[rows], 1 - decay)
            moment.write(rows, momentum, turns(parameter, rows, state["step"]))
            grad[rows].lerp_(momentum, decay)

    def _fused(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], *state: list[Tensor]) -> None:
        averages, squares, steps = state
        adamw(
            weights,
            grads,
            averages,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, shards: dist.ProcessGroup | None = None
) -> ShardedOptimizer:
    """The optimizer of what is trained; weight decay is on matrices, not on embedding tables and vectors.

    `shards`: the ranks among which parameters are split, none for a model that is whole on this one.
    """
    decayed, plain, orthogonal = dict[str, nn.Parameter](), dict[str, nn.Parameter](), dict[str, nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.dim() < 2 or any(table in name for table in _TABLES)
            by_muon = config.name == "muon" and is_orthogonalised(name, parameter)
            (orthogonal if by_muon else plain if is_plain else decayed)[name] = parameter
    groups: list[dict[str, Any]] = [
        {"params": [*parameters.values()], "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if parameters
    ]
    if orthogonal:
        muon = Muon([*orthogonal.values()], [*orthogonal], config, shards)
        groups.append({"params": [*orthogonal.values()], "weight_decay": config.weight_decay, "muon": muon})
    return ShardedOptimizer(groups, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
