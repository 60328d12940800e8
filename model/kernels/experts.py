"""Rows of tokens to the experts and back in one pass each, without the copies [T, top_k, D] of the plain path.

A program has one token. It copies its row to the slots of its experts, or adds up what lies in these slots, in float32
and in the order of its top-k. Each slot belongs to one token, so that nothing is written twice, nor depends on which
program comes first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.case import Case
from model.kernels.rows import as_rows, row_case, tile


def permute(x_TD: Tensor, slot: Tensor, top_k: int) -> Tensor:
    """Rows of tokens, copied to where their experts read them: `slot[t * top_k + k]` is row t's place for its k-th."""
    return _Permute.apply(x_TD, slot, top_k)


def weighted_combine(y_sorted: Tensor, weights_Tk: Tensor, slot: Tensor) -> Tensor:
    """Each token's weighted sum [T, D] of what lies in its slots, rounded once to the dtype of `y_sorted`."""
    return _WeightedCombine.apply(y_sorted, weights_Tk, slot)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, slot: Tensor, top_k: int) -> Tensor:
        x_TD = as_rows(x_TD)
        num_tokens, width = x_TD.shape
        out = x_TD.new_empty((num_tokens * top_k, width))
        ctx.save_for_backward(slot)
        ctx.top_k = top_k
        if num_tokens:
            _, columns, num_warps = tile(width)
            copy_to_slots[(num_tokens,)](x_TD, slot, out, x_TD.stride(0), width, columns, top_k, num_warps=num_warps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return _summed(grad, None, slot, ctx.top_k), None, None


class _WeightedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_sorted: Tensor, weights_Tk: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(y_sorted, weights_Tk, slot)
        return _summed(y_sorted, weights_Tk.contiguous(), slot, weights_Tk.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_sorted, weights_Tk, slot = ctx.saved_tensors
        grad_TD, y_sorted, weights_Tk = as_rows(grad_TD), as_rows(y_sorted), weights_Tk.contiguous()
        of_y, of_weights = y_sorted.new_empty(y_sorted.shape), torch.empty_like(weights_Tk)
        (num_tokens, top_k), width = weights_Tk.shape, y_sorted.shape[1]
        if num_tokens:
            _, columns, num_warps = tile(width)
            combine_backward[(num_tokens,)](
                *(grad_TD, y_sorted, weights_Tk, slot, of_y, of_weights, grad_TD.stride(0), y_sorted.stride(0)),
                *(width, columns, top_k),
                num_warps=num_warps,
            )
        return of_y, of_weights, None


def _summed(rows: Tensor, weights_Tk: Tensor | None, slot: Tensor, top_k: int) -> Tensor:
    rows = as_rows(rows)
    num_tokens, width = len(slot) // top_k, rows.shape[1]
    out_TD = rows.new_empty((num_tokens, width))
    if num_tokens:
        _, columns, num_warps = tile(width)
        sum_of_slots[(num_tokens,)](
            *(rows, weights_Tk, slot, out_TD, rows.stride(0), width, columns, top_k), num_warps=num_warps
        )
    return out_TD


@triton.jit
def copy_to_slots(
    x: tl.tensor,
    slot: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
) -> None:
    """One row, read once and written `TOP_K` times."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    row = tl.load(x + token * x_stride + column, mask=column < WIDTH, other=0.0)
    for k in tl.static_range(TOP_K):
        place = tl.load(slot + token * TOP_K + k)
        tl.store(out + place * WIDTH + column, row, mask=column < WIDTH)


@triton.jit
def sum_of_slots(
    rows: tl.tensor,
    weights: tl.tensor,
    slot: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
) -> None:
    """The sum of `TOP_K` rows in order, each times its weight if there are weights."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(slot + token * TOP_K + k)
        row = tl.load(rows + place * row_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + token * TOP_K + k).to(tl.float32)
        total += row
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def combine_backward(
    grad: tl.tensor,
    y: tl.tensor,
    weights: tl.tensor,
    slot: tl.tensor,
    of_y: tl.tensor,
    of_weights: tl.tensor,
    grad_stride: tl.tensor,
    y_stride: tl.tensor,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
) -> None:
    """One token's gradient, times each weight to the weight's slot; and its products with what lies there."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    g = tl.load(grad + token * grad_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(slot + token * TOP_K + k)
        weight = tl.load(weights + token * TOP_K + k).to(tl.float32)
        row = tl.load(y + place * y_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        tl.store(of_weights + token * TOP_K + k, tl.sum(g * row).to(of_weights.dtype.element_ty))
        tl.store(of_y + place * WIDTH + column, (g * weight).to(of_y.dtype.element_ty), mask=column < WIDTH)


def cases(capability: int = 90) -> list[Case]:
    """What 8,192 tokens of the 26B-A4B send to 8 experts each, and get back."""
    tokens, width, top_k = 8192, 2816, 8
    _, columns, num_warps = tile(width)
    constants = {"WIDTH": width, "COLUMNS": columns, "TOP_K": top_k}
    summed = {"rows": "*bf16", "slot": "*i64", "out": "*bf16", "row_stride": "i32"}
    backward = dict.fromkeys(("grad", "y", "of_y"), "*bf16") | dict.fromkeys(("weights", "of_weights"), "*fp32")
    backward |= {"slot": "*i64", "grad_stride": "i32", "y_stride": "i32"}
    return [
        row_case(
            f"{name}, {top_k} experts of {width}",
            kernel,
            types,
            constants,
            operations=tokens * top_k * width * operations,
            bytes_=tokens * width * 2 * rows,
            num_warps=num_warps,
        )
        for name, kernel, types, operations, rows in (
            ("permute", copy_to_slots, {"x": "*bf16", "slot": "*i64", "out": "*bf16", "x_stride": "i32"}, 0, 1 + top_k),
            ("permute, backward", sum_of_slots, summed, 1, top_k + 1),
            ("combine", sum_of_slots, summed | {"weights": "*fp32"}, 2, top_k + 1),
            ("combine, backward", combine_backward, backward, 3, 1 + 2 * top_k),
        )
    ]
