"""The output head: soft cap, and the fused linear cross entropy that never holds the batch's logits.

Per chunk of tokens: logits, soft cap, log-sum-exp, and at once the gradients of hidden states
and head, so the largest buffer is [chunk, V]. (Cut cross entropy goes further on a GPU but
drops small gradients; this one is exact.) The formulas are in docs/gemma4.md 7.1 and 7.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.precision import accumulation_dtype


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
        """Soft-capped scores [..., V] (docs/gemma4.md 7.1)."""
        return softcapped_logits(F.linear(hidden, weight_VD), self.softcap)

    def forward(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float = 0.0) -> CrossEntropy:
        """The fused loss: see `linear_cross_entropy`."""
        return linear_cross_entropy(hidden_TD, weight_VD, labels_T, softcap=self.softcap, z_loss=z_loss)

    def log_probs(
        self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int | None = None
    ) -> Tensor:
        """Log-probability [T] of each label, differentiable, for objectives that weigh tokens afterwards.

        In the accumulation dtype. Scores are made chunk by chunk, and again in the backward, so no tensor is [T, V].
        """
        if chunk_size is None:
            chunk_size = default_chunk_size(hidden_TD.device, weight_VD.shape[0])
        return _LogProbs.apply(hidden_TD, weight_VD, labels_T, self.softcap, chunk_size)


def softcapped_logits(logits: Tensor, cap: float) -> Tensor:
    """Scores bounded to (-cap, cap), by a scaled tanh."""
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
    """Sum of -log softmax(softcap(h W^T))[label], plus `z_loss` times the squared log-sum-exp (docs/gemma4.md 7.2).

    labels_T: [T] int64, all in [0, V); select supervised rows first. chunk_size: tokens per
    chunk, of which there are three buffers [chunk, V]; by default `default_chunk_size`.
    """
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden_TD.device, weight_VD.shape[0])
    return CrossEntropy(*_LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, softcap, z_loss, chunk_size))


class LossGradients:
    """Gradients of hidden states and head, which a loss makes chunk by chunk, in its forward or its backward."""

    def __init__(self, ctx: Any, hidden_TD: Tensor, weight_VD: Tensor) -> None:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        self.weight_VD = weight_VD
        self.of_hidden = torch.empty_like(hidden_TD) if wants_hidden else None
        dtype = accumulation_dtype(weight_VD.dtype)
        self.of_weight = torch.zeros_like(weight_VD, dtype=dtype) if wants_weight else None
        self.wanted = wants_hidden or wants_weight

    def add(self, start: int, hidden: Tensor, capped: Tensor, grad_fp32: Tensor) -> None:
        """Add a chunk's gradients, given those of its scores; `capped` is in units of the cap. Both are overwritten."""
        grad = grad_fp32.mul_(capped.square_().neg_().add_(1)).to(self.weight_VD.dtype)
        if self.of_hidden is not None:
            torch.mm(grad, self.weight_VD, out=self.of_hidden[start : start + hidden.shape[0]])
        if self.of_weight is not None and grad.dtype == self.of_weight.dtype:
            self.of_weight.addmm_(grad.T, hidden)
        elif self.of_weight is not None:
            self.of_weight += grad.T @ hidden

    def save(self, ctx: Any) -> None:
        """Keep the gradients for the backward, which only scales them."""
        ctx.weight_dtype = self.weight_VD.dtype
        ctx.save_for_backward(self.of_hidden, self.of_weight)

    @staticmethod
    def scaled(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The saved gradients, times the gradient of the loss."""
        of_hidden, of_weight = ctx.saved_tensors
        # In place, since a copy would be as large as the head; autograd itself refuses a second backward.
        if of_hidden is not None:
            of_hidden.mul_(grad_total)
        if of_weight is not None:
            of_weight = of_weight.mul_(grad_total).to(ctx.weight_dtype)
        return of_hidden, of_weight


def capped_scores_(out: Tensor, hidden: Tensor, weight_VD: Tensor, softcap: float) -> None:
    """Fill a float32 buffer with a chunk's soft-capped scores, in units of the cap."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight_VD.T, out=out)
    else:
        out.copy_(hidden @ weight_VD.T)
    out.div_(softcap).tanh_()


def default_chunk_size(device: torch.device, vocabulary: int) -> int:
    """Tokens that keep a buffer [chunk, vocabulary] near 16 MiB on a CPU and 256 MiB on a GPU; at least 64."""
    return max(64, (1 << (22 if device.type == "cpu" else 26)) // vocabulary)


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
        gradients = LossGradients(ctx, hidden_TD, weight_VD)
        dtype = accumulation_dtype(hidden_TD.dtype)
        nll = hidden_TD.new_zeros((), dtype=dtype)
        z = nll.clone()
        # Three buffers serve every chunk: fresh ones of this size would cost more than the arithmetic.
        buffers = hidden_TD.new_empty((3, min(chunk_size, hidden_TD.shape[0]), weight_VD.shape[0]), dtype=dtype)
        for start in range(0, hidden_TD.shape[0], chunk_size):
            hidden, labels = hidden_TD[start : start + chunk_size], labels_T[start : start + chunk_size, None]
            capped, scores, log_p = buffers[:, : hidden.shape[0]].unbind()
            capped_scores_(capped, hidden, weight_VD, softcap)
            torch.mul(capped, softcap, out=scores)
            torch.log_softmax(scores, dim=-1, out=log_p)
            log_p_label = log_p.gather(1, labels)
            log_z = scores.gather(1, labels) - log_p_label
            nll -= log_p_label.sum()
            z += log_z.square().sum()
            if gradients.wanted:
                grad_fp32 = log_p.exp_()
                if z_loss:
                    grad_fp32.mul_(1 + 2 * z_loss * log_z)
                grad_fp32.scatter_add_(1, labels, torch.full_like(log_z, -1.0))
                gradients.add(start, hidden, capped, grad_fp32)
        gradients.save(ctx)
        ctx.mark_non_differentiable(nll, z)
        return nll + z_loss * z, nll, z

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *LossGradients.scaled(ctx, grad_total), None, None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, softcap: float, chunk_size: int
    ) -> Tensor:
        found_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=accumulation_dtype(hidden_TD.dtype))
        for rows, capped, scores in score_chunks(hidden_TD, weight_VD, softcap, chunk_size):
            torch.log_softmax(scores, dim=-1, out=capped)
            found_T[rows] = capped.gather(1, labels_T[rows, None])[:, 0]
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T)
        ctx.softcap, ctx.chunk_size = softcap, chunk_size
        return found_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, labels_T = ctx.saved_tensors
        gradients = LossGradients(ctx, hidden_TD, weight_VD)
        for rows, capped, scores in score_chunks(hidden_TD, weight_VD, ctx.softcap, ctx.chunk_size):
            weights_T1 = grad_T[rows, None]
            torch.softmax(scores, dim=-1, out=scores)
            scores.mul_(-weights_T1).scatter_add_(1, labels_T[rows, None], weights_T1)
            gradients.add(rows.start, hidden_TD[rows], capped, scores)
        of_weight = gradients.of_weight
        return gradients.of_hidden, None if of_weight is None else of_weight.to(weight_VD.dtype), None, None, None


def score_chunks(
    hidden_TD: Tensor, weight_VD: Tensor, softcap: float, chunk_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a chunk, its scores in units of the cap, and its scores: two buffers that serve every chunk."""
    shape = (2, min(chunk_size, hidden_TD.shape[0]), weight_VD.shape[0])
    buffers = hidden_TD.new_empty(shape, dtype=accumulation_dtype(hidden_TD.dtype))
    for start in range(0, hidden_TD.shape[0], chunk_size):
        rows = slice(start, min(start + chunk_size, hidden_TD.shape[0]))
        capped, scores = buffers[:, : rows.stop - start].unbind()
        capped_scores_(capped, hidden_TD[rows], weight_VD, softcap)
        torch.mul(capped, softcap, out=scores)
        yield rows, capped, scores
