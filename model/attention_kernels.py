"""Softmax attention over the keys of an `AttentionMask`: one kernel for each device and width of head.

`blocked` (CPU, and wide heads on a GPU): queries in blocks against the span of keys the block can see, so a sliding
layer costs S * W, a packed full layer the sum over its documents, and unsupervised stretches nothing.
`flex` (heads of up to 256 on a GPU): compiled flex attention over the same mask. Not run on a GPU so far.
`triton` (on a GPU, where chosen): kernels of this project (`model/kernels`), for every width. Not run on a GPU so far.
`partial_attention` is for keys that arrive block by block: it also gives the log-sum-exp by which outputs merge.
Scores are not scaled (Gemma 4 normalises queries and keys) and have no soft cap (docs/gemma4.md 3.1).

Letters of this file: Q queries of a block or padded sequence, R keys of a block, G = N / K query heads of a KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from model.masks import AttentionMask, Block
from model.precision import accumulation_dtype, product, upcast
from model.triton_choice import attends_by_triton

AttentionKernel = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]
PartialKernel = Callable[[Tensor, Tensor, Tensor, AttentionMask], tuple[Tensor, Tensor]]
FlexCall = Callable[[Tensor, Tensor, Tensor, BlockMask], Any]

LARGEST_FLEX_HEAD = 256
"""At 512, that of full layers, flex attention in bfloat16 asks for more shared memory than any GPU has."""


def attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: AttentionMask) -> Tensor:
    """Outputs [T_queries, N, H]; query head n reads KV head n // (N / K)."""
    if q_TNH.shape[0] == 0:  # flex refuses it; keys and values still get their (zero) gradients
        return q_TNH + 0 * (k_TKH.sum() + v_TKH.sum())
    k_BSKH, v_BSKH = (t.unflatten(0, (mask.batch_size, mask.num_keys)) for t in (k_TKH, v_TKH))
    return kernel_for(q_TNH.device.type, q_TNH.shape[-1], q_TNH.dtype)(q_TNH, k_BSKH, v_BSKH, mask)


def partial_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Outputs over some of the keys, and their log-sum-exp [T, N] in float32; at least one query.

    Differentiable in both. A query that sees none of the keys gets 0 and -inf, and gives no gradient.
    """
    k_BSKH, v_BSKH = (t.unflatten(0, (mask.batch_size, mask.num_keys)) for t in (k_TKH, v_TKH))
    kernel = kernel_for(q_TNH.device.type, q_TNH.shape[-1], q_TNH.dtype)
    partials: dict[AttentionKernel, PartialKernel] = {triton: triton_partial, flex: flex_partial}
    return partials.get(kernel, blocked_partial)(q_TNH, k_BSKH, v_BSKH, mask)


def kernel_for(device_type: str, head_dim: int, dtype: torch.dtype) -> AttentionKernel:
    """Triton's where it is chosen; else flex attention on a GPU for heads that fit it, and the blocked kernel."""
    if attends_by_triton(device_type, dtype):
        return triton
    return flex if device_type == "cuda" and head_dim <= LARGEST_FLEX_HEAD else blocked


def triton(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    """Attention by the kernels of this project, for every width of head."""
    from model.kernels.attention import triton_attention

    return triton_attention(q_TNH, k_BSKH, v_BSKH, mask)


def triton_partial(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """The same over some of the keys, with the log-sum-exp [T, N] by which parts are merged."""
    from model.kernels.attention import triton_partial

    return triton_partial(q_TNH, k_BSKH, v_BSKH, mask)


def flex_shared_memory(head_dim: int, itemsize: int) -> int:
    """Bytes of shared memory that flex attention's forward takes at torch's tile for wide heads.

    A tile of queries stays; keys and values come in stages. For heads above 256 torch has this one candidate.
    """
    queries, keys, stages = 64, 32, 3
    return (queries + 2 * stages * keys) * head_dim * itemsize


def blocked(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    """Attention by products of matrices, in blocks of queries over the keys that each block can see."""
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
            probabilities = _scores(q, k, block, mask).softmax(dim=-1).to(v.dtype)
            out_TNH[block.query_start : block.query_end] = _ungroup(probabilities @ v, block)
        ctx.mask = mask
        ctx.save_for_backward(q_TNH, k_BSKH, v_BSKH, out_TNH)
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_TNH, k_BSKH, v_BSKH, out_TNH = ctx.saved_tensors
        dot_TN = (upcast(grad_TNH) * upcast(out_TNH)).sum(dim=-1)
        return *_gradients(q_TNH, k_BSKH, v_BSKH, ctx.mask, None, grad_TNH, dot_TN), None


def blocked_partial(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """The blocked kernel over some of the keys, with the log-sum-exp [T, N] by which parts are merged."""
    return _BlockedPartial.apply(q_TNH, k_BSKH, v_BSKH, mask)


class _BlockedPartial(torch.autograd.Function):
    """The function of `_Blocked` with the log-sum-exp beside it; a query may see nothing."""

    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        num_kv_heads = k_BSKH.shape[2]
        out_TNH = torch.zeros_like(q_TNH)
        lse_TN = q_TNH.new_full(q_TNH.shape[:2], float("-inf"), dtype=accumulation_dtype(q_TNH.dtype))
        for block in mask.blocks:
            q, k, v = _gather(block, num_kv_heads, q_TNH, k_BSKH, v_BSKH)
            scores = _scores(q, k, block, mask)
            lse = scores.logsumexp(dim=-1, keepdim=True)
            rows = slice(block.query_start, block.query_end)
            out_TNH[rows] = _ungroup(_exp_over(scores, lse).to(v.dtype) @ v, block)
            lse_TN[rows] = _ungroup(lse, block)[..., 0]
        ctx.mask = mask
        ctx.save_for_backward(q_TNH, k_BSKH, v_BSKH, out_TNH, lse_TN)
        return out_TNH, lse_TN

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor, grad_lse_TN: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_TNH, k_BSKH, v_BSKH, out_TNH, lse_TN = ctx.saved_tensors
        dot_TN = (upcast(grad_TNH) * upcast(out_TNH)).sum(dim=-1) - grad_lse_TN
        return *_gradients(q_TNH, k_BSKH, v_BSKH, ctx.mask, lse_TN, grad_TNH, dot_TN), None


def _gradients(
    q_TNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: AttentionMask,
    lse_TN: Tensor | None,
    grad_TNH: Tensor,
    dot_TN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `dot_TN` is what softmax takes off each query's gradient of its scores."""
    num_kv_heads = k_BSKH.shape[2]
    grad_q, grad_k, grad_v = map(torch.zeros_like, (q_TNH, k_BSKH, v_BSKH))
    for block in mask.blocks:
        q, k, v = _gather(block, num_kv_heads, q_TNH, k_BSKH, v_BSKH)
        rows = slice(block.query_start, block.query_end)
        grad = _group(grad_TNH[rows], num_kv_heads)
        scores = _scores(q, k, block, mask)
        if lse_TN is None:
            probabilities = scores.softmax(dim=-1)
        else:
            probabilities = _exp_over(scores, _group(lse_TN[rows, :, None], num_kv_heads))
        keys = (block.sequence, slice(block.key_start, block.key_end))
        grad_v[keys] += (probabilities.to(v.dtype).mT @ grad).transpose(0, 1)
        dot = _group(dot_TN[rows, :, None], num_kv_heads)
        grad_scores = product(grad, v.mT).sub_(dot).mul_(probabilities).to(q.dtype)
        grad_q[rows] = _ungroup(grad_scores @ k, block)
        grad_k[keys] += (grad_scores.mT @ q).transpose(0, 1)
    return grad_q, grad_k, grad_v


def _gather(block: Block, num_kv_heads: int, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> tuple[Tensor, ...]:
    keys = (block.sequence, slice(block.key_start, block.key_end))
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


def _scores(q: Tensor, k: Tensor, block: Block, mask: AttentionMask) -> Tensor:
    """Scores [K, G * Q, R] in float32, -inf where the query may not look."""
    rows = slice(block.query_start, block.query_end)
    keys = torch.arange(block.key_start, block.key_end, device=q.device)
    hidden_QR = (keys < mask.first_key_T[rows, None]) | (keys > mask.last_key_T[rows, None])
    scores = product(q, k.mT)
    num_queries = block.query_end - block.query_start
    scores.unflatten(1, (-1, num_queries)).masked_fill_(hidden_QR, float("-inf"))
    return scores


def _exp_over(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); zero for a query that sees nothing, whose every number is -inf.

    Not in place: selective recomputation may have kept the scores, a product, for the backward.
    """
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp_()


_FLEX_GRAPHS = 64
"""One graph per head width, dtype, shape, and with or without gradients: more than torch's limit of 8."""


def flex(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    """Attention on a GPU, by compiled flex attention."""
    with torch.compiler.config.patch(recompile_limit=_FLEX_GRAPHS):  # type: ignore[attr-defined]
        return flex_over(_compiled(flex_call, mask), q_TNH, k_BSKH, v_BSKH, mask)


def flex_partial(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Flex attention over some of the keys, with the log-sum-exp [T, N] by which parts are merged."""
    with torch.compiler.config.patch(recompile_limit=_FLEX_GRAPHS):  # type: ignore[attr-defined]
        return flex_partial_over(_compiled(flex_call_with_lse, mask), q_TNH, k_BSKH, v_BSKH, mask)


def flex_call(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Any:
    """Flex attention with what is the same in every layer as constants of its graph."""
    return flex_attention(q, k, v, block_mask=block_mask, scale=1.0, enable_gqa=True)


def flex_call_with_lse(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Any:
    """The same, with the log-sum-exp beside the output."""
    return flex_attention(q, k, v, block_mask=block_mask, scale=1.0, enable_gqa=True, return_aux=AuxRequest(lse=True))


def _compiled(call: FlexCall, mask: AttentionMask) -> FlexCall:
    """Whole batches have one shape, known when their kernel is made; numbers of narrowed queries change."""
    return _compiled_flex(call, dynamic=mask.padding is not None or mask.num_queries != mask.batch_size * mask.num_keys)


@cache
def _compiled_flex(call: FlexCall, *, dynamic: bool) -> FlexCall:
    # Whole or not at all: a silent fall-back would hold the scores of every pair.
    return torch.compile(call, dynamic=dynamic, fullgraph=True)


def flex_over(kernel: FlexCall, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    """Pad the queries of each sequence to one length, run a flex kernel, and take the real ones back out."""
    return _real(_run_flex(kernel, q_TNH, k_BSKH, v_BSKH, mask), mask)


def flex_partial_over(
    kernel: FlexCall, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask
) -> tuple[Tensor, Tensor]:
    """The outputs of `flex_over`, with the log-sum-exp."""
    out_BNQH, aux = _run_flex(kernel, q_TNH, k_BSKH, v_BSKH, mask)
    return _real(out_BNQH, mask), _real(aux.lse, mask)


def _run_flex(kernel: FlexCall, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Any:
    k, v = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    padding = mask.padding
    q_BQNH = q_TNH.unflatten(0, (mask.batch_size, -1)) if padding is None else q_TNH[padding.index_BQ]
    return kernel(q_BQNH.transpose(1, 2), k, v, mask.block_mask)


def _real(x_BNQ: Tensor, mask: AttentionMask) -> Tensor:
    """[B, N, Q, ...] -> [T, N, ...], without the padded queries."""
    x_TN = x_BNQ.transpose(1, 2).flatten(0, 1)
    return x_TN if mask.padding is None else x_TN[mask.padding.real_T]
