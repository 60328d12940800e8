"""Expert parallel: experts split over `ep`, tokens travelling to them and back by all-to-all.

One copy of a token goes to each rank that has any of its experts, and one row comes back: the
weighted sum over that rank's experts. Nothing is dropped. The layer's dense branch is computed
while tokens travel, and its backward while their gradients do. At home a token's rows are added in
float32 in the order of ranks, so that the sum does not depend on when they arrive.

An expert is too small to be cut as well: ranks of tensor parallel bring different tokens, and `ep` may span them.

Letters of this file: R ranks, C copies that a rank sends, A copies that arrived on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from model import Gemma4
from model.moe import Experts, grouped_mm, run_experts, run_routed
from model.precision import accumulation_dtype, upcast
from parallel.collectives import exchange_counts, exchange_rows, start_exchange
from parallel.dtensors import local_part, sharded_parameter
from parallel.mesh import Mesh
from parallel.tensor.tokens import TensorParallel


class ParallelExperts(nn.Module):
    """In place of `Experts` on `meta`: this rank's run of consecutive experts.

    Ranks of tensor parallel that all hold every token take a run of them each.
    """

    grouped_mm: Callable[..., Tensor]

    def __init__(self, experts: Experts, mesh: DeviceMesh, plan: TensorParallel | None = None) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        if mesh.size() > 1:
            self.gate_up_proj, self.down_proj = (
                sharded_parameter(p, mesh, (Shard(0),)) for p in (self.gate_up_proj, self.down_proj)
            )
        self.group, self.plan, self.grouped_mm = mesh.get_group(), plan, grouped_mm
        self.held = experts.gate_up_proj.shape[0] // mesh.size()
        self.first = mesh.get_local_rank() * self.held

    def forward(
        self, x_TD: Tensor, weights_Tk: Tensor, indices_Tk: Tensor, meanwhile: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum [T, D] of what the chosen experts, on whichever rank, make of each token.

        The second is what `meanwhile` makes while tokens travel.
        """
        plan = self.plan
        if plan is None or plan.sequence_parallel:
            return self._routed(x_TD, weights_Tk, indices_Tk, meanwhile)
        mine = plan.my_tokens(len(x_TD))
        routed, other = self._routed(x_TD[mine], weights_Tk[mine], indices_Tk[mine], meanwhile)
        return plan.gather_my_tokens(routed, len(x_TD)), other

    def _routed(
        self, x_TD: Tensor, weights_Tk: Tensor, indices_Tk: Tensor, meanwhile: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Each token's weighted sum [T, D] over its experts, on whichever ranks they are."""
        if self.group.size() == 1:  # nothing travels, and the numbers are those of `Experts`
            gate_up, down = local_part(self.gate_up_proj), local_part(self.down_proj)
            other = meanwhile()
            return run_routed(x_TD, weights_Tk, indices_Tk, gate_up, down, self.grouped_mm), other
        owner_Tk, ranks = indices_Tk // self.held, self.group.size()
        wanted_TR = torch.zeros(len(x_TD), ranks, dtype=torch.bool, device=x_TD.device).scatter_(1, owner_Tk, True)
        choices_R = torch.zeros(ranks, dtype=torch.long, device=x_TD.device)
        choices_R.scatter_add_(0, owner_Tk.flatten(), torch.ones_like(owner_Tk.flatten()))
        counts_R2 = torch.stack((wanted_TR.sum(dim=0), choices_R), dim=1)
        # All sizes that follow are read here, at once: the only time that the host waits for a layer's device.
        counts = torch.stack((counts_R2, exchange_counts(counts_R2, self.group))).tolist()
        sends, receives = ([copies for copies, _ in side] for side in counts)
        token_C = torch.nonzero_static(wanted_TR.T, size=sum(sends))[:, 1]  # rank by rank, tokens in order
        copies = [t[token_C] for t in (x_TD, weights_Tk, indices_Tk)]
        arrive = start_exchange(copies, sends, receives, self.group)
        other = meanwhile()
        x_AD, weights_Ak, indices_Ak = arrive()
        out_AD = self._local(x_AD, weights_Ak, indices_Ak - self.first, sum(choices for _, choices in counts[1]))
        out_CD = exchange_rows(out_AD.to(x_TD.dtype), receives, sends, self.group)
        out_TD = torch.zeros_like(x_TD, dtype=accumulation_dtype(x_TD.dtype))
        return out_TD.index_add(0, token_C, upcast(out_CD)).to(x_TD.dtype), other

    def _local(self, x_AD: Tensor, weights_Ak: Tensor, local_Ak: Tensor, choices: int) -> Tensor:
        """The weighted sum [A, D], float32, over those of each copy's experts that are here, `choices` in all."""
        here_Ak = (local_Ak >= 0) & (local_Ak < self.held)
        row, slot = torch.nonzero_static(here_Ak, size=choices).unbind(dim=1)
        expert, order = local_Ak[row, slot].sort(stable=True)  # grouped by expert, copies in order
        row, slot = row[order], slot[order]
        offsets = torch.searchsorted(expert, torch.arange(self.held, device=expert.device), right=True).to(torch.int32)
        gate_up, down = local_part(self.gate_up_proj), local_part(self.down_proj)
        y = run_experts(x_AD[row], offsets, gate_up, down, self.grouped_mm)
        weighted = upcast(y) * weights_Ak[row, slot, None]
        return torch.zeros_like(x_AD, dtype=weighted.dtype).index_add(0, row, weighted)


def apply_expert_parallel(model: Gemma4, mesh: Mesh, plan: TensorParallel | None) -> None:
    """Split the experts of a model on `meta`, or of one stage of it, where any plan splits them or their tokens."""
    if mesh.layout.ep == 1 and plan is None:
        return
    for layer in model.layers:
        if layer.has_experts:
            layer.experts = ParallelExperts(cast(Experts, layer.experts), mesh.ep, plan)
