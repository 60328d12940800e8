"""Attention over keys and values that travel around a ring of ranks, one rank's block at a time.

Each block gives outputs and their log-sum-exp, by which they merge into those over all keys. The
backward sends the blocks around once more, and with each the sum of its gradients so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.attention import KeyValue
from model.attention_kernels import partial_attention
from model.masks import AttentionMask
from model.precision import accumulation_dtype, upcast
from parallel.collectives import RingTransfer, ring_send_recv

Parts = tuple[AttentionMask | None, ...]
"""Masks over the blocks in order of arrival, this rank's own first; None where no query sees any of it."""

Make = Callable[[int, Sequence[Tensor], Tensor | None], KeyValue]
"""Makes keys and values of a block, given the step it arrives at, what travels of it, and a weight all ranks have."""


def as_they_are(step: int, block: Sequence[Tensor], weight: Tensor | None) -> KeyValue:
    """Keys and values of a block that travels finished, normed and rotated by its owner."""
    return KeyValue(*block)


def ring_attention(
    q_TNH: Tensor,
    own: Sequence[Tensor],
    weight: Tensor | None,
    make: Make,
    parts: Parts,
    group: dist.ProcessGroup,
) -> Tensor:
    """Outputs [T_queries, N, H] over the keys of all ranks, which `make` makes of each one's `own`.

    Every query sees a key of its own rank. Needs two ranks or more, and all of them, queries or none.
    """
    return _Ring.apply(q_TNH, weight, make, parts, group, *own)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        weight: Tensor | None,
        make: Make,
        parts: Parts,
        group: dist.ProcessGroup,
        *own: Tensor,
    ) -> Tensor:
        out_TNH = torch.zeros_like(q_TNH, dtype=accumulation_dtype(q_TNH.dtype))
        lse_TN = torch.full_like(out_TNH[..., 0], float("-inf"))
        block = own = tuple(t.contiguous() for t in own)
        for step, part in enumerate(parts):
            passing = ring_send_recv(block, group) if step + 1 < len(parts) else None
            if part is not None and part.num_queries:
                partial_TNH, partial_lse_TN = partial_attention(q_TNH, *make(step, block, weight), part)
                # Finite from the first block on, in which every query sees a key.
                merged_TN = torch.logaddexp(lse_TN, partial_lse_TN)
                out_TNH.mul_((lse_TN - merged_TN).exp_()[..., None])
                out_TNH.addcmul_(upcast(partial_TNH), (partial_lse_TN - merged_TN).exp_()[..., None])
                lse_TN = merged_TN
            if passing is not None:
                block = passing.wait()
        out_TNH = out_TNH.to(q_TNH.dtype)
        ctx.make, ctx.parts, ctx.group = make, parts, group
        ctx.save_for_backward(q_TNH, weight, out_TNH, lse_TN, *own)
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, weight, out_TNH, lse_TN, *block = ctx.saved_tensors
        inputs = [q_TNH] if weight is None else [q_TNH, weight]
        sums = [_sum_of(t) for t in inputs]
        coming: RingTransfer | None = None
        for step, part in enumerate(ctx.parts):
            passing = ring_send_recv(tuple(block), ctx.group) if step + 1 < len(ctx.parts) else None
            found: Sequence[Tensor] = ()
            if part is not None and part.num_queries:
                make = partial(ctx.make, step)
                found = _block_gradients(make, q_TNH, weight, block, part, out_TNH, lse_TN, grad_TNH)
                for total, more in zip(sums, found, strict=False):
                    total += more
            # The sums of a block go with it, a step behind, so that they travel while the next is computed.
            of_block = coming.wait() if coming else tuple(map(_sum_of, block))
            for total, more in zip(of_block, found[len(sums) :], strict=False):
                total += more
            coming = ring_send_recv(of_block, ctx.group)
            if passing is not None:
                block = list(passing.wait())
        assert coming is not None
        grad_q, *grad_weight = (total.to(t.dtype) for total, t in zip(sums, inputs, strict=True))
        grads = (total.to(t.dtype) for total, t in zip(coming.wait(), block, strict=True))
        return grad_q, grad_weight[0] if grad_weight else None, None, None, None, *grads


def _sum_of(x: Tensor) -> Tensor:
    """Zeros, to which gradients of x are added."""
    return torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))


def _block_gradients(
    make: Callable[[Sequence[Tensor], Tensor | None], KeyValue],
    q_TNH: Tensor,
    weight: Tensor | None,
    block: Sequence[Tensor],
    part: AttentionMask,
    out_TNH: Tensor,
    lse_TN: Tensor,
    grad_TNH: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, of the weight if there is one, and of one block, through what it gave to the merged outputs."""
    leaves = [t.detach().requires_grad_() for t in (q_TNH, *(() if weight is None else (weight,)), *block)]
    with torch.enable_grad():
        made = make(leaves[-len(block) :], None if weight is None else leaves[1])
        partial_TNH, partial_lse_TN = partial_attention(leaves[0], *made, part)
    weight_TN = (partial_lse_TN.detach() - lse_TN).exp_()
    weighted_TNH = weight_TN[..., None] * upcast(grad_TNH)
    grad_lse_TN = (weighted_TNH * (upcast(partial_TNH.detach()) - upcast(out_TNH))).sum(dim=-1)
    grads = (weighted_TNH.to(partial_TNH.dtype), grad_lse_TN.to(partial_lse_TN.dtype))
    return torch.autograd.grad((partial_TNH, partial_lse_TN), leaves, grads)
