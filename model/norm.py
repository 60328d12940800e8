"""RMSNorm as Gemma 4 has it: plain weight (not 1 + w), all of it in float32, one cast back (docs/gemma4.md 2.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.precision import upcast
from model.triton_choice import by_triton


class RMSNorm(nn.Module):
    """`y = x * (mean(x^2) + eps)^(-1/2) * w` over the last dim; `with_scale=False` has no w."""

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float, *, with_scale: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if with_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of root mean square 1 along the last axis, times the weight; in the dtype of x."""
        return rms_norm(x, self.weight, self.eps)

    def add_to(self, x: Tensor, branch: Tensor) -> Tensor:
        """Hidden states plus the norm of a branch, which is where a branch ends."""
        if self.weight is not None and by_triton(x):
            from model.kernels.norm import fused_add_rms_norm

            return fused_add_rms_norm(x, branch, self.weight, self.eps)
        return x + self(branch)


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """`RMSNorm` with a weight from elsewhere, or none; in the dtype of x.

    On a GPU by one kernel, Triton's or torch's, which computes in float32 what it reads and writes narrower.
    """
    if by_triton(x):
        from model.kernels.norm import fused_rms_norm

        return fused_rms_norm(x, weight_D, eps)
    if x.is_cuda and (weight_D is None or weight_D.dtype == x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight_D, eps)
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    """The norm with its gradients by hand: it keeps its input and one number a vector, and fills few buffers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        wide = upcast(x)
        normed = wide.square()
        rstd = normed.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rstd)
        torch.mul(wide, rstd, out=normed)
        if weight_D is not None:
            normed.mul_(weight_D)
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, rstd = ctx.saved_tensors
        grad_ND, x_ND, rstd_N1 = (upcast(t.reshape(-1, t.shape[-1])) for t in (grad, x, rstd))
        products_ND = grad_ND * x_ND
        of_weight = None
        if weight_D is None:
            dots_N1 = products_ND.sum(dim=-1, keepdim=True)
            of_x = grad_ND.clone()
        else:
            wide_D = upcast(weight_D)
            if ctx.needs_input_grad[1]:
                of_weight = torch.mv(products_ND.T, rstd_N1[:, 0]).to(weight_D.dtype)
            dots_N1 = torch.mv(products_ND, wide_D)[:, None]
            of_x = torch.mul(grad_ND, wide_D, out=products_ND)
        # d/dx of x * rstd: g * rstd - x * (g . x) * rstd^3 / D
        of_x.addcmul_(x_ND, dots_N1.mul_(rstd_N1.square()).div_(-x.shape[-1])).mul_(rstd_N1)
        return of_x.view(x.shape).to(x.dtype), of_weight, None
