"""Attention over keys and values that travel around a ring of ranks, one rank's block at a time.

Each block gives outputs and their log-sum-exp, by which they merge into those over all keys. The
backward sends the blocks around once more, and with each the sum of its gradients so far.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.attention_kernels import partial_attention
from model.masks import AttentionMask
from parallel.collectives import Passing, pass_around

Parts = tuple[AttentionMask | None, ...]
"""Masks over the blocks in order of arrival, this rank's own first; None where no query sees any of it."""


def ring_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, parts: Parts, group: dist.ProcessGroup) -> Tensor:
    """Outputs [T_queries, N, H] over the keys of all ranks, of which this one has a block [T, K, H].

    Every query sees a key of its own rank. Needs two ranks or more, and all of them, queries or none.
    """
    return _Ring.apply(q_TNH, k_TKH, v_TKH, parts, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, parts: Parts, group: dist.ProcessGroup
    ) -> Tensor:
        out_TNH = torch.zeros_like(q_TNH, dtype=torch.float32)
        lse_TN = torch.full_like(q_TNH[..., 0], float("-inf"), dtype=torch.float32)
        own = (k_TKH.contiguous(), v_TKH.contiguous())
        block: tuple[Tensor, ...] = own
        for step, part in enumerate(parts):
            passing = pass_around(block, group) if step + 1 < len(parts) else None
            if part is not None and part.num_queries:
                partial_TNH, partial_lse_TN = partial_attention(q_TNH, block[0], block[1], part)
                # Finite from the first block on, in which every query sees a key.
                merged_TN = torch.logaddexp(lse_TN, partial_lse_TN)
                out_TNH.mul_((lse_TN - merged_TN).exp_()[..., None])
                out_TNH.addcmul_(partial_TNH.float(), (partial_lse_TN - merged_TN).exp_()[..., None])
                lse_TN = merged_TN
            if passing is not None:
                block = passing.wait()
        out_TNH = out_TNH.to(q_TNH.dtype)
        ctx.parts, ctx.group = parts, group
        ctx.save_for_backward(q_TNH, *own, out_TNH, lse_TN)
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_TNH, *own, out_TNH, lse_TN = ctx.saved_tensors
        block = tuple(own)
        grad_q = torch.zeros_like(q_TNH, dtype=torch.float32)
        coming: Passing | None = None
        for step, part in enumerate(ctx.parts):
            passing = pass_around(block, ctx.group) if step + 1 < len(ctx.parts) else None
            found = None
            if part is not None and part.num_queries:
                found = _block_gradients(q_TNH, block, part, out_TNH, lse_TN, grad_TNH)
                grad_q += found[0]
            # The sums of a block go with it, a step behind, so that they travel while the next is computed.
            sums = coming.wait() if coming else tuple(torch.zeros_like(t, dtype=torch.float32) for t in block)
            if found is not None:
                sums = tuple(total.add_(more) for total, more in zip(sums, found[1:], strict=True))
            coming = pass_around(sums, ctx.group)
            if passing is not None:
                block = passing.wait()
        assert coming is not None
        grad_k, grad_v = coming.wait()
        return grad_q.to(q_TNH.dtype), grad_k.to(block[0].dtype), grad_v.to(block[1].dtype), None, None


def _block_gradients(
    q_TNH: Tensor,
    block: tuple[Tensor, ...],
    part: AttentionMask,
    out_TNH: Tensor,
    lse_TN: Tensor,
    grad_TNH: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q and one block's k and v, through what the block gave to the merged outputs."""
    q, k, v = (t.detach().requires_grad_() for t in (q_TNH, *block))
    with torch.enable_grad():
        partial_TNH, partial_lse_TN = partial_attention(q, k, v, part)
    weight_TN = (partial_lse_TN.detach() - lse_TN).exp_()
    weighted_TNH = weight_TN[..., None] * grad_TNH.float()
    grad_lse_TN = (weighted_TNH * (partial_TNH.detach().float() - out_TNH.float())).sum(dim=-1)
    grads = (weighted_TNH.to(partial_TNH.dtype), grad_lse_TN.to(partial_lse_TN.dtype))
    return torch.autograd.grad((partial_TNH, partial_lse_TN), (q, k, v), grads)
