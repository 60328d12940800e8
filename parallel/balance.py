"""How evenly the router loads the experts: counts for the metrics, and two optional losses.

The balance loss is `E * sum_e f_e P_e`, f_e the share of choices that fell on expert e and P_e its
mean probability (Switch Transformer, arXiv 2101.03961, eq. 4); the z-loss is the mean squared
log-sum-exp of the scores (ST-MoE, arXiv 2202.08906, eq. 5). Both are means over all tokens of a
micro-batch on all ranks, added to the gradient of the scores, so that they go with any objective,
recomputation and pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from model import Gemma4
from model.decoder import DecoderLayer
from model.precision import upcast
from parallel.collectives import summed


class RouterBalance:
    """What one layer's router does, as the `balance` of `model.moe.Router`.

    Recomputation counts a batch twice, which leaves shares and means as they are.
    """

    def __init__(
        self, layer: int, top_k: int, num_experts: int, groups: Sequence[dist.ProcessGroup], balance: float, z: float
    ) -> None:
        self.layer, self.top_k, self.groups, self.balance, self.z = layer, top_k, groups, balance, z
        self.scale = 1.0
        """Of the losses' gradients: one over the number of micro-batches in a step."""
        self.totals = torch.zeros(num_experts + 3, dtype=torch.float64)
        """Choices of each expert; then, summed over calls, both losses and the number of calls."""

    def __call__(self, scores_TE: Tensor) -> Tensor:
        with torch.no_grad():
            chosen_Tk = scores_TE.topk(self.top_k).indices
            # Unlike a bincount, this does not make the host wait for a GPU.
            choices_E = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_Tk, True).sum(dim=0)
            self.totals = self.totals.to(scores_TE.device)
            self.totals[: len(choices_E)] += choices_E
        if not (torch.is_grad_enabled() and (self.balance or self.z)):
            return scores_TE
        return _AddLosses.apply(scores_TE, choices_E, self)

    def summed(self, values: Tensor) -> Tensor:
        for group in self.groups:
            values = summed(values, group)
        return values


class _AddLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, choices_E: Tensor, router: RouterBalance) -> Tensor:
        num_experts = scores_TE.shape[1]
        scores = upcast(scores_TE)
        log_z_T1 = scores.logsumexp(dim=-1, keepdim=True)
        probabilities_TE = (scores - log_z_T1).exp()
        tokens = scores.new_tensor([len(scores)])
        sums = router.summed(
            torch.cat((choices_E.to(scores), probabilities_TE.sum(dim=0), log_z_T1.square().sum().view(1), tokens))
        )
        sums[-1].clamp_min_(1.0)
        share_E = sums[:num_experts] / sums[:num_experts].sum().clamp_min(1.0)
        mean_E = sums[num_experts:-2] / sums[-1]
        router.totals[-3:] += torch.stack(
            (num_experts * (share_E * mean_E).sum(), sums[-2] / sums[-1], torch.ones_like(tokens[0]))
        )
        pull_E = router.balance * num_experts * share_E
        grad_TE = probabilities_TE * (pull_E - (probabilities_TE * pull_E).sum(dim=-1, keepdim=True))
        grad_TE += 2 * router.z * log_z_T1 * probabilities_TE
        ctx.save_for_backward((grad_TE * (router.scale / sums[-1])).to(scores_TE.dtype))
        return scores_TE.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (added,) = ctx.saved_tensors
        return grad + added, None, None


def watch_routers(
    model: Gemma4, groups: Sequence[dist.ProcessGroup], balance: float = 0.0, z: float = 0.0
) -> list[RouterBalance]:
    """Give every router of a model, or of one stage of it, its `balance`; `groups` together make up all its ranks."""
    config, found = model.config, []
    for module in model.language_model.layers:
        layer = cast(DecoderLayer, module)
        if layer.has_experts:
            assert config.num_experts and config.top_k_experts
            watched = RouterBalance(layer.layer.index, config.top_k_experts, config.num_experts, groups, balance, z)
            layer.router.balance = watched
            found.append(watched)
    return found


def read_balance(routers: Sequence[RouterBalance], config: Any) -> dict[str, float]:
    """Of the steps since the last reading, over all ranks; collective over the world.

    `moe_imbalance`: load of the fullest expert over the mean; `moe_unused_experts`: experts without a token.
    """
    layers, experts = config.num_hidden_layers, config.num_experts
    table = torch.zeros(layers, experts + 3, dtype=torch.float64)
    for router in routers:
        table[router.layer] = router.totals.cpu()
        router.totals = torch.zeros_like(router.totals)
    dist.all_reduce(table)
    load, calls = table[:, :experts], table[:, -1].clamp_min(1)
    imbalance = load.amax(dim=1) / load.mean(dim=1).clamp_min(1e-9)
    found = {f"moe_imbalance/layer_{layer:02}": float(value) for layer, value in enumerate(imbalance)}
    found |= {"moe_imbalance": float(imbalance.mean()), "moe_unused_experts": float((load == 0).sum(1).double().mean())}
    if any(router.balance for router in routers):
        found["moe_balance_loss"] = float((table[:, -3] / calls).mean())
    if any(router.z for router in routers):
        found["moe_router_z_loss"] = float((table[:, -2] / calls).mean())
    return found
