"""The output head: soft cap, and the fused linear cross entropy that never holds the batch's logits.

Per chunk of tokens: logits, soft cap, log-sum-exp, and at once the gradients of hidden states
and head, so the largest buffer is [chunk, V]. (Cut cross entropy goes further on a GPU but
drops small gradients; this one is exact.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropy(NamedTuple):
    """Sums over tokens, float32. `total` is differentiable and includes the z-loss."""

    total: Tensor
    nll: Tensor
    z: Tensor


class Head(nn.Module):
    """Scores and loss through the token table [V, D], which is the head; a plan that splits it replaces this module."""

    def __init__(self, softcap: float) -> None:
        super().__init__()
        self.softcap = softcap

    def logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        """Soft-capped scores [..., V]."""
        return softcapped_logits(F.linear(hidden, weight_VD), self.softcap)

    def forward(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float = 0.0) -> CrossEntropy:
        """As `linear_cross_entropy`."""
        return linear_cross_entropy(hidden_TD, weight_VD, labels_T, softcap=self.softcap, z_loss=z_loss)


def softcapped_logits(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    softcap: float,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> CrossEntropy:
    """Sum of -log softmax(softcap(h W^T))[label], plus `z_loss` times the squared log-sum-exp.

    labels_T: [T] int64, all in [0, V); select supervised rows first. chunk_size: tokens per
    chunk; by default as many as keep each of three buffers [chunk, V] near 16 MiB on a CPU and
    256 MiB on a GPU, but at least 64.
    """
    if chunk_size is None:
        budget = 1 << (22 if hidden_TD.device.type == "cpu" else 26)
        chunk_size = max(64, budget // weight_VD.shape[0])
    return CrossEntropy(*_LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, softcap, z_loss, chunk_size))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        softcap: float,
        z_loss: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        nll = hidden_TD.new_zeros((), dtype=torch.float32)
        z = nll.clone()
        # Three buffers serve every chunk: fresh ones of this size would cost more than the arithmetic.
        buffers = hidden_TD.new_empty((3, min(chunk_size, hidden_TD.shape[0]), weight_VD.shape[0]), dtype=torch.float32)
        for start in range(0, hidden_TD.shape[0], chunk_size):
            hidden, labels = hidden_TD[start : start + chunk_size], labels_T[start : start + chunk_size, None]
            capped, scores, log_p = buffers[:, : hidden.shape[0]].unbind()
            if hidden.dtype == torch.float32:
                torch.mm(hidden, weight_VD.T, out=capped)
            else:
                capped.copy_(hidden @ weight_VD.T)
            capped.div_(softcap).tanh_()  # in units of the cap
            torch.mul(capped, softcap, out=scores)
            torch.log_softmax(scores, dim=-1, out=log_p)
            log_p_label = log_p.gather(1, labels)
            log_z = scores.gather(1, labels) - log_p_label
            nll -= log_p_label.sum()
            z += log_z.square().sum()
            if not (wants_hidden or wants_weight):
                continue
            grad_fp32 = log_p.exp_()
            if z_loss:
                grad_fp32.mul_(1 + 2 * z_loss * log_z)
            grad_fp32.scatter_add_(1, labels, torch.full_like(log_z, -1.0))
            grad = grad_fp32.mul_(capped.square_().neg_().add_(1)).to(weight_VD.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight_VD, out=grad_hidden[start : start + chunk_size])
            if grad_weight is not None and grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden)
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll, z)
        return nll + z_loss * z, nll, z

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place, since a copy would be as large as the head; autograd itself refuses a second backward.
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None
