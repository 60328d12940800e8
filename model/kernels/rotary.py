"""RMSNorm of heads and their rotary position embedding in one pass: one read, one write, float32 between them.

A head's pairs are (j, j + H/2), so that a program holds its rows as two halves. What is kept for the backward are the
input and one number a head; the weight's gradient is summed like that of the other norms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.case import Case
from model.kernels.rows import resident_programs, row_case, tile


def fused_norm_rotary(x_TNH: Tensor, weight_H: Tensor | None, cos_TR: Tensor, sin_TR: Tensor, eps: float) -> Tensor:
    """Heads [T, N, H] of root mean square 1, times the weight, of which the first R pairs are rotated; contiguous.

    The table gets no gradient.
    """
    return _NormRotary.apply(x_TNH, weight_H, cos_TR, sin_TR, eps)


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, weight_H: Tensor | None, cos_TR: Tensor, sin_TR: Tensor, eps: float) -> Tensor:
        x_TNH, cos_TR, sin_TR = _as_heads(x_TNH), cos_TR.contiguous(), sin_TR.contiguous()
        num_tokens, num_heads, width = x_TNH.shape
        num_rows = num_tokens * num_heads
        out_TNH = x_TNH.new_empty(x_TNH.shape)
        rstd = x_TNH.new_empty(num_rows, dtype=torch.float32)
        rows, columns, num_warps = tile(width)
        if num_rows:
            norm_rotary_forward[(triton.cdiv(num_rows, rows),)](
                *(x_TNH, weight_H, cos_TR, sin_TR, out_TNH, rstd, *x_TNH.stride()[:2], num_rows, eps),
                *(num_heads, width // 2, cos_TR.shape[1], rows, columns // 2),
                num_warps=num_warps,
            )
        ctx.save_for_backward(x_TNH, weight_H, cos_TR, sin_TR, rstd)
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        x_TNH, weight_H, cos_TR, sin_TR, rstd = ctx.saved_tensors
        grad_TNH = _as_heads(grad_TNH)
        num_tokens, num_heads, width = x_TNH.shape
        num_rows = num_tokens * num_heads
        of_x = x_TNH.new_empty(x_TNH.shape)
        rows, columns, num_warps = tile(width, elements=2048)
        # Twice as many as of the norms of hidden states, whose programs have twice the warps.
        programs = min(triton.cdiv(num_rows, rows), 2 * resident_programs(x_TNH.device))
        of_weight = x_TNH.new_empty((programs, width), dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if num_rows:
            norm_rotary_backward[(programs,)](
                *(grad_TNH, x_TNH, weight_H, cos_TR, sin_TR, rstd, of_x, of_weight),
                *(*grad_TNH.stride()[:2], *x_TNH.stride()[:2], num_rows),
                *(num_heads, width // 2, cos_TR.shape[1], rows, columns // 2),
                num_warps=num_warps,
            )
        if of_weight is not None:
            of_weight = of_weight.sum(dim=0).to(weight_H.dtype)
        return of_x, of_weight, None, None, None


def _as_heads(x_TNH: Tensor) -> Tensor:
    """The tensor itself if each head is contiguous, wherever the heads lie."""
    return x_TNH if x_TNH.stride(2) == 1 else x_TNH.contiguous()


@triton.jit
def norm_rotary_forward(
    x: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    rstd: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Heads of a tile, each a row, normed and rotated."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head, column = (row // HEADS)[:, None], (row % HEADS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows)[:, None] & (column < HALF)
    place = x + token * token_stride + head * head_stride + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + eps)
    tl.store(rstd + row, inverse, mask=row < num_rows)
    first, second = first * inverse[:, None], second * inverse[:, None]
    if weight is not None:
        first *= tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)
        second *= tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    turns = (row < num_rows)[:, None] & (column < ROTATED)
    c = tl.load(cos + token * ROTATED + column, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + token * ROTATED + column, mask=turns, other=0.0).to(tl.float32)
    place = out + row[:, None] * (2 * HALF) + column
    tl.store(place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotary_backward(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rstd: tl.tensor,
    of_x: tl.tensor,
    of_weight: tl.tensor,
    grad_token_stride: tl.tensor,
    grad_head_stride: tl.tensor,
    x_token_stride: tl.tensor,
    x_head_stride: tl.tensor,
    num_rows: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Gradients of one program's heads, turned back, and the sum of what they give the weight."""
    column = tl.arange(0, COLUMNS)[None, :]
    of_first, of_second = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        token, head = (row // HEADS)[:, None], (row % HEADS)[:, None]
        inside = (row < num_rows)[:, None] & (column < HALF)
        turns = (row < num_rows)[:, None] & (column < ROTATED)
        c = tl.load(cos + token * ROTATED + column, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + token * ROTATED + column, mask=turns, other=0.0).to(tl.float32)
        place = grad + token * grad_token_stride + head * grad_head_stride + column
        g_first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        g_second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        g_first, g_second = g_first * c + g_second * s, g_second * c - g_first * s
        inverse = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        place = x + token * x_token_stride + head * x_head_stride + column
        first = tl.load(place, mask=inside, other=0.0).to(tl.float32) * inverse
        second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32) * inverse
        if of_weight is not None:
            of_first += g_first * first
            of_second += g_second * second
        if weight is not None:
            g_first *= tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)
            g_second *= tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
        mean = tl.sum(g_first * first + g_second * second, axis=1)[:, None] / (2 * HALF)
        place = of_x + row[:, None] * (2 * HALF) + column
        tl.store(place, ((g_first - first * mean) * inverse).to(of_x.dtype.element_ty), mask=inside)
        tl.store(place + HALF, ((g_second - second * mean) * inverse).to(of_x.dtype.element_ty), mask=inside)
    if of_weight is not None:
        place = of_weight + tl.program_id(0) * (2 * HALF) + column
        tl.store(place, tl.sum(of_first, axis=0)[None, :], mask=column < HALF)
        tl.store(place + HALF, tl.sum(of_second, axis=0)[None, :], mask=column < HALF)


def cases(capability: int = 90) -> list[Case]:
    """Queries and keys of 8,192 tokens of the 31B: of sliding layers, and of full ones, which rotate a quarter."""
    return [
        _case(f"norm and rotary, {num_heads} heads of {width}", num_heads, width, rotated, backward=backward)
        for backward in (False, True)
        for num_heads, width, rotated in ((32, 256, 128), (16, 256, 128), (32, 512, 64), (4, 512, 64))
    ]


def _case(name: str, num_heads: int, width: int, rotated: int, *, backward: bool) -> Case:
    types = {"x": "*bf16", "weight": "*fp32", "cos": "*bf16", "sin": "*bf16", "rstd": "*fp32", "num_rows": "i32"}
    if backward:
        types |= {"grad": "*bf16", "of_x": "*bf16", "of_weight": "*fp32"}
        types |= {f"{of}_{axis}_stride": "i32" for of in ("grad", "x") for axis in ("token", "head")}
    else:
        types |= {"out": "*bf16", "token_stride": "i32", "head_stride": "i32", "eps": "fp32"}
    rows, columns, num_warps = tile(width, *((2048,) if backward else ()))
    numbers = 8192 * num_heads * width
    return row_case(
        f"{name}, backward" if backward else name,
        norm_rotary_backward if backward else norm_rotary_forward,
        types,
        {"HEADS": num_heads, "HALF": width // 2, "ROTATED": rotated, "ROWS": rows, "COLUMNS": columns // 2},
        operations=numbers * (11 if backward else 7),
        bytes_=numbers * 2 * (2 + backward),
        num_warps=num_warps,
    )
