"""Softmax attention over the keys of an `AttentionMask`: one kernel per device.

`blocked` (CPU): queries in blocks against the span of keys the block can see, so a sliding
layer costs S * W, a packed full layer the sum over its documents, and unsupervised stretches nothing.
`flex` (GPU): compiled flex attention over the same mask. Unverified on GPU.
Scores are not scaled (Gemma 4 normalises queries and keys) and have no soft cap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from model.masks import AttentionMask, Block

AttentionKernel = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]


def attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: AttentionMask) -> Tensor:
    """Outputs [T_queries, N, H]; query head n reads KV head n // (N / K)."""
    if q_TNH.shape[0] == 0:  # flex refuses it; keys and values still get their (zero) gradients
        return q_TNH + 0 * (k_TKH.sum() + v_TKH.sum())
    k_BSKH, v_BSKH = (t.unflatten(0, (mask.num_rows, mask.num_keys)) for t in (k_TKH, v_TKH))
    return kernel_for(q_TNH.device.type)(q_TNH, k_BSKH, v_BSKH, mask)


def kernel_for(device_type: str) -> AttentionKernel:
    return flex if device_type == "cuda" else blocked


def blocked(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    return _Blocked.apply(q_TNH, k_BSKH, v_BSKH, mask)


class _Blocked(torch.autograd.Function):
    """Softmax over each block's key span; the backward makes the probabilities again.

    Heads are grouped by KV head, so grouped-query attention repeats nothing:
    q [K, G * Q, H] against k [K, R, H], with G = N / K queries per KV head.
    """

    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
        num_kv_heads = k_BSKH.shape[2]
        out_TNH = torch.empty_like(q_TNH)
        for block in mask.blocks:
            q, k, v = _gather(block, num_kv_heads, q_TNH, k_BSKH, v_BSKH)
            probabilities = _probabilities(q, k, block, mask).to(v.dtype)
            out_TNH[block.query_start : block.query_end] = _ungroup(probabilities @ v, block)
        ctx.mask = mask
        ctx.save_for_backward(q_TNH, k_BSKH, v_BSKH, out_TNH)
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_TNH, k_BSKH, v_BSKH, out_TNH = ctx.saved_tensors
        num_kv_heads = k_BSKH.shape[2]
        grad_q, grad_k, grad_v = torch.empty_like(q_TNH), torch.zeros_like(k_BSKH), torch.zeros_like(v_BSKH)
        dot_TN = (grad_TNH.float() * out_TNH.float()).sum(dim=-1)
        for block in ctx.mask.blocks:
            q, k, v = _gather(block, num_kv_heads, q_TNH, k_BSKH, v_BSKH)
            rows = slice(block.query_start, block.query_end)
            grad = _group(grad_TNH[rows], num_kv_heads)
            probabilities = _probabilities(q, k, block, ctx.mask)
            keys = (block.row, slice(block.key_start, block.key_end))
            grad_v[keys] += (probabilities.to(v.dtype).mT @ grad).transpose(0, 1)
            dot = _group(dot_TN[rows, :, None], num_kv_heads)
            grad_scores = (grad @ v.mT).float().sub_(dot).mul_(probabilities).to(q.dtype)
            grad_q[rows] = _ungroup(grad_scores @ k, block)
            grad_k[keys] += (grad_scores.mT @ q).transpose(0, 1)
        return grad_q, grad_k, grad_v, None


def _gather(block: Block, num_kv_heads: int, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> tuple[Tensor, ...]:
    keys = (block.row, slice(block.key_start, block.key_end))
    q = _group(q_TNH[block.query_start : block.query_end], num_kv_heads)
    return q, k_BSKH[keys].transpose(0, 1), v_BSKH[keys].transpose(0, 1)


def _group(x_QNH: Tensor, num_kv_heads: int) -> Tensor:
    """[Q, N, H] -> [K, G * Q, H]."""
    num_queries, _, width = x_QNH.shape
    return x_QNH.view(num_queries, num_kv_heads, -1, width).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, width)


def _ungroup(x: Tensor, block: Block) -> Tensor:
    """[K, G * Q, H] -> [Q, N, H]."""
    num_queries = block.query_end - block.query_start
    return x.unflatten(1, (-1, num_queries)).permute(2, 0, 1, 3).flatten(1, 2)


def _probabilities(q: Tensor, k: Tensor, block: Block, mask: AttentionMask) -> Tensor:
    """Softmax [K, G * Q, R] in float32, zero where the query may not look."""
    rows = slice(block.query_start, block.query_end)
    keys = torch.arange(block.key_start, block.key_end, device=q.device)
    hidden_QR = (keys < mask.first_key_T[rows, None]) | (keys > mask.last_key_T[rows, None])
    scores = (q @ k.mT).float()
    num_queries = block.query_end - block.query_start
    scores.unflatten(1, (-1, num_queries)).masked_fill_(hidden_QR, float("-inf"))
    return scores.softmax(dim=-1)


_FLEX_GRAPHS = 64
"""One graph per head width, dtype, batch size class, and with or without gradients: more than torch's limit of 8."""


@cache
def _compiled_flex() -> Callable[..., Any]:
    # Whole or not at all: a silent fall-back would hold the scores of every pair.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=_FLEX_GRAPHS):
        return flex_over(_compiled_flex(), q_TNH, k_BSKH, v_BSKH, mask)


def flex_over(kernel: Callable[..., Any], q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    """Pad the queries of each row to one length, run a flex kernel, and take the real rows back out."""
    k, v = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    padding = mask.padding
    q_BQNH = q_TNH.unflatten(0, (mask.num_rows, -1)) if padding is None else q_TNH[padding.index_BQ]
    out_BNQH = kernel(q_BQNH.transpose(1, 2), k, v, block_mask=mask.block_mask, scale=1.0, enable_gqa=True)
    out_TNH = out_BNQH.transpose(1, 2).flatten(0, 1)
    return out_TNH if padding is None else out_TNH[padding.real_T]
