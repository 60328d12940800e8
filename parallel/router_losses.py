"""How evenly the router loads the experts: counts for the metrics, and two optional losses.

The balance loss is `E * sum_e f_e P_e`, f_e the share of choices that fell on expert e and P_e its
mean probability (Switch Transformer, arXiv 2101.03961, eq. 4); the z-loss is the mean squared
log-sum-exp of the scores (ST-MoE, arXiv 2202.08906, eq. 5). Both are means over all tokens of a
micro-batch on all ranks, added to the gradient of the scores, so that they go with any objective,
recomputation and pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import Gemma4
from model.precision import upcast
from parallel.collectives import all_reduced
from parallel.options import MoEConfig


class RouterBalance:
    """What one layer's router does: the `observer` of a `model.moe.Router`.

    Recomputation counts a batch twice, which leaves shares and means as they are.
    """

    def __init__(self, layer: int, num_experts: int, groups: Sequence[dist.ProcessGroup], losses: MoEConfig) -> None:
        self.layer, self.groups, self.losses = layer, groups, losses
        self.scale = 1.0
        """Factor of the losses' gradients: one over the number of micro-batches in a step."""
        self.totals = torch.zeros(num_experts + 3, dtype=torch.float64)
        """Choices of each expert; then, summed over calls, both losses and the number of calls."""

    def __call__(self, scores_TE: Tensor, indices_Tk: Tensor) -> None:
        """Count the choices, and add the gradients of the losses to that of the scores; in training only."""
        if not torch.is_grad_enabled():
            return
        wants_losses = (self.losses.balance_loss or self.losses.router_z_loss) and scores_TE.requires_grad
        with torch.no_grad():
            # Unlike a bincount, this does not make the host wait for a GPU.
            chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, indices_Tk, True)
            choices_E = chosen_TE.sum(dim=0)
            self.totals = self.totals.to(scores_TE.device)
            self.totals[: len(choices_E)] += choices_E
            if wants_losses:
                added_TE = self._gradient(scores_TE, choices_E)
                scores_TE.register_hook(lambda grad_TE: grad_TE + added_TE)

    def _gradient(self, scores_TE: Tensor, choices_E: Tensor) -> Tensor:
        """The gradient of both losses, in the dtype of the scores; collective."""
        num_experts = scores_TE.shape[1]
        scores = upcast(scores_TE)
        log_z_T1 = scores.logsumexp(dim=-1, keepdim=True)
        probabilities_TE = (scores - log_z_T1).exp()
        tokens = scores.new_tensor([len(scores)])
        sums = torch.cat((choices_E.to(scores), probabilities_TE.sum(dim=0), log_z_T1.square().sum().view(1), tokens))
        for group in self.groups:
            sums = all_reduced(sums, group)
        sums[-1].clamp_min_(1.0)
        share_E = sums[:num_experts] / sums[:num_experts].sum().clamp_min(1.0)
        mean_E = sums[num_experts:-2] / sums[-1]
        self.totals[-3:] += torch.stack(
            (num_experts * (share_E * mean_E).sum(), sums[-2] / sums[-1], torch.ones_like(tokens[0]))
        )
        pull_E = self.losses.balance_loss * num_experts * share_E
        grad_TE = probabilities_TE * (pull_E - (probabilities_TE * pull_E).sum(dim=-1, keepdim=True))
        grad_TE += 2 * self.losses.router_z_loss * log_z_T1 * probabilities_TE
        return (grad_TE * (self.scale / sums[-1])).to(scores_TE.dtype)


def watch_routers(model: Gemma4, groups: Sequence[dist.ProcessGroup], losses: MoEConfig) -> list[RouterBalance]:
    """Give every router of a model, or of one stage of it, an observer; `groups` together make up all its ranks."""
    config, found = model.config, []
    for layer in model.layers:
        if config.moe is not None:
            watched = RouterBalance(layer.spec.index, config.moe.num_experts, groups, losses)
            layer.router.observer = watched
            found.append(watched)
    return found


def read_balance(routers: Sequence[RouterBalance], config: Any) -> dict[str, float]:
    """How the routers did since the last reading, over all ranks; collective over the world.

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
    if any(router.losses.balance_loss for router in routers):
        found["moe_balance_loss"] = float((table[:, -3] / calls).mean())
    if any(router.losses.router_z_loss for router in routers):
        found["moe_router_z_loss"] = float((table[:, -2] / calls).mean())
    return found
