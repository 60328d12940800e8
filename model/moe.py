"""Mixture of experts of the 26B-A4B: float32 router, grouped matmul over experts, dropless.

The sum over a token's experts runs in the order of its top-k, so it depends on the data only.
In the grouped product K and N are a matrix's in-features and out-features, as in [E, K, N].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Gemma4Config
from model.linear import Linear
from model.mlp import gated_gelu
from model.norm import RMSNorm
from model.precision import upcast
from model.triton_choice import by_triton


def has_grouped_kernel(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped product in this dtype: on a GPU in bfloat16 only, on a CPU up to float32."""
    return dtype == torch.bfloat16 or (device_type == "cpu" and dtype != torch.float64)


def grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    """Products by expert, of whose rows `offs[e]` is the end: x [T, K] and weight [E, K, N] make [T, N].

    x [K, T] and weight [T, N] make [E, K, N], the sums over each expert's rows. Where torch has no such kernel, experts
    run one after the other.
    """
    if has_grouped_kernel(x.device.type, x.dtype):
        return F.grouped_mm(x, weight, offs=offs)
    spans = [slice(start, end) for start, end in pairwise([0, *offs.tolist()])]
    if weight.dim() == 2:
        return torch.stack([x[:, span] @ weight[span] for span in spans])
    return torch.cat([x[span] @ weight_KN for span, weight_KN in zip(spans, weight, strict=True)])


class Router(nn.Module):
    """Scores the un-normed hidden states, in float32 to the end: softmax over all, top-k, renormalise, scale by expert.

    The formula is in docs/gemma4.md 5.2. `observer` is called with the scores [T, E] and the chosen experts [T, top_k]:
    it may count the choices, and add to the gradient of the scores by a hook.
    """

    observer: Callable[[Tensor, Tensor], None] | None

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        assert config.moe is not None
        self.top_k = config.moe.top_k
        self.root_size = config.hidden_size**-0.5
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, with_scale=False)
        self.proj = Linear(config.hidden_size, config.moe.num_experts)
        self.proj.read = upcast  # scores of 8 bits would tie, and ties are broken by the order of experts
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.moe.num_experts))
        self.observer = None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Routing weights (float32) and expert indices, both [T, top_k]."""
        scores_TE = self.proj(self.norm(upcast(x_TD)) * upcast(self.scale) * self.root_size)
        weights, indices = scores_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.observer is not None:
            self.observer(scores_TE, indices)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * upcast(self.per_expert_scale[indices]), indices


class _Dispatch(torch.autograd.Function):
    """Copy each token to its top-k slots, sorted by expert; the backward sums a token's slots in top-k order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Tensor, slot: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.top_k = top_k
        return x_TD[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        return grad[slot].view(len(slot) // ctx.top_k, ctx.top_k, grad.shape[-1]).sum(dim=1), None, None, None


class _Combine(torch.autograd.Function):
    """Undo the sort by expert: a permutation, whose backward is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[slot]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


class Experts(nn.Module):
    """All experts' weights packed: axis 0 expert; gate rows, then up rows; [out, in] each (docs/gemma4.md 5.3)."""

    grouped_mm: Callable[..., Tensor]

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        assert config.moe is not None
        E, D, F_ = config.moe.num_experts, config.hidden_size, config.moe.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.grouped_mm = grouped_mm

    def forward(
        self, x_TD: Tensor, weights_Tk: Tensor, indices_Tk: Tensor, meanwhile: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum [T, D] of what the chosen experts make of each token, and what `meanwhile` makes.

        A plan that sends tokens to experts elsewhere calls it while they travel.
        """
        other = meanwhile()
        return run_routed(x_TD, weights_Tk, indices_Tk, self.gate_up_proj, self.down_proj, self.grouped_mm), other


def run_routed(
    x_TD: Tensor,
    weights_Tk: Tensor,
    indices_Tk: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    grouped_mm: Callable[..., Tensor] = grouped_mm,
) -> Tensor:
    """Each token's weighted sum [T, D] over its experts, all of which are here."""
    num_tokens, top_k = indices_Tk.shape
    order = indices_Tk.flatten().argsort(stable=True)  # slots grouped by expert, tokens in order
    experts = torch.arange(gate_up_EFD.shape[0], device=order.device)
    offsets = torch.searchsorted(indices_Tk.flatten()[order], experts, right=True).to(torch.int32)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(order.numel(), device=order.device)
    if by_triton(x_TD):
        from model.kernels.experts import permute, weighted_combine

        y = run_experts(permute(x_TD, slot, top_k), offsets, gate_up_EFD, down_EDF, grouped_mm)
        return weighted_combine(y, weights_Tk, slot)
    rows = _Dispatch.apply(x_TD, order, slot, top_k)
    y = run_experts(rows, offsets, gate_up_EFD, down_EDF, grouped_mm)
    y_TkD = _Combine.apply(y, order, slot).view(num_tokens, top_k, x_TD.shape[-1])
    return (y_TkD * weights_Tk[..., None]).sum(dim=1).to(x_TD.dtype)


def run_experts(
    x: Tensor, offsets: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, grouped_mm: Callable[..., Tensor] = grouped_mm
) -> Tensor:
    """Each expert over its rows of x, which are grouped by expert; `offsets[e]` is the end of expert e's rows."""
    gate, up = grouped_mm(x, gate_up_EFD.transpose(-2, -1), offs=offsets).chunk(2, dim=-1)
    return grouped_mm(gated_gelu(gate, up), down_EDF.transpose(-2, -1), offs=offsets)
