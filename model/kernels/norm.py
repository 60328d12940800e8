"""RMSNorm in one pass, alone or as the end of a branch: `(x + rms_norm(branch)) * scale`.

All of it is float32 between one read and one write. What is kept for the backward are the input and one number a row.
Each program of the backward sums the weight's gradient over its own rows and writes the sum once; one reduction over
programs follows, so that nothing depends on which program comes first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.case import Case
from model.kernels.rows import as_rows, resident_programs, row_case, tile


def fused_rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Vectors of root mean square 1 along the last axis, times the weight; in the dtype of x."""
    return _RMSNorm.apply(x, weight_D, eps, None, None)


def fused_add_rms_norm(x: Tensor, branch: Tensor, weight_D: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """Hidden states plus the norm of a branch, in the dtype of x, which is rounded to once.

    scale: one number that multiplies the sum, such as the `layer_scalar` of a layer; it gets no gradient.
    """
    return _RMSNorm.apply(branch, weight_D, eps, x, scale)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor | None, eps: float, residual: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        x_ND = as_rows(x)
        num_rows, width = x_ND.shape
        residual_ND = None if residual is None else as_rows(residual)
        out_ND = x_ND.new_empty(x_ND.shape, dtype=x.dtype if residual is None else residual.dtype)
        rstd_N = x_ND.new_empty(num_rows, dtype=torch.float32)
        rows, columns, num_warps = tile(width)
        if num_rows:
            norm_forward[(triton.cdiv(num_rows, rows),)](
                *(x_ND, residual_ND, weight_D, scale, out_ND, rstd_N),
                *(x_ND.stride(0), 0 if residual_ND is None else residual_ND.stride(0), num_rows, eps),
                *(width, rows, columns),
                num_warps=num_warps,
            )
        ctx.adds = residual is not None
        ctx.save_for_backward(x, weight_D, rstd_N, scale)
        return out_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, rstd_N, scale = ctx.saved_tensors
        x_ND, grad_ND = as_rows(x), as_rows(grad)
        num_rows, width = x_ND.shape
        of_x = x_ND.new_empty(x_ND.shape)
        of_residual = grad if scale is None else grad.new_empty(grad.shape)
        rows, columns, num_warps = tile(width, elements=2048)
        programs = min(triton.cdiv(num_rows, rows), resident_programs(x.device))
        of_weight = x.new_empty((programs, width), dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if num_rows:
            norm_backward[(programs,)](
                *(grad_ND, x_ND, weight_D, rstd_N, scale, of_x, None if scale is None else of_residual, of_weight),
                *(grad_ND.stride(0), x_ND.stride(0), num_rows),
                *(width, rows, columns),
                num_warps=num_warps,
            )
        if of_weight is not None:
            of_weight = of_weight.sum(dim=0).to(weight_D.dtype)
        return of_x.view(x.shape), of_weight, None, of_residual if ctx.adds else None, None


@triton.jit
def norm_forward(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    rstd: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Rows of a tile, normed; plus the residual's and times the scale, where they are given."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows)[:, None] & (column < WIDTH)
    values = tl.load(x + row[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    tl.store(rstd + row, inverse, mask=row < num_rows)
    values = values * inverse[:, None]
    if weight is not None:
        values = values * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row[:, None] * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        values = values * tl.load(scale).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    scale: tl.tensor,
    of_x: tl.tensor,
    of_residual: tl.tensor,
    of_weight: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Gradients of one program's rows, tile after tile, and the sum of what they give the weight."""
    column = tl.arange(0, COLUMNS)[None, :]
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < WIDTH)
        inverse = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        normed = tl.load(x + row[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32) * inverse
        g = tl.load(grad + row[:, None] * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            g = g * factor
            tl.store(of_residual + row[:, None] * WIDTH + column, g.to(of_residual.dtype.element_ty), mask=inside)
        if of_weight is not None:
            sums += g * normed
        if weight is not None:
            g = g * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        # d/dx of x * rstd: (g - normed * mean(g * normed)) * rstd
        mean = tl.sum(g * normed, axis=1)[:, None] / WIDTH
        tl.store(
            of_x + row[:, None] * WIDTH + column,
            ((g - normed * mean) * inverse).to(of_x.dtype.element_ty),
            mask=inside,
        )
    if of_weight is not None:
        tl.store(of_weight + tl.program_id(0) * WIDTH + column, tl.sum(sums, axis=0)[None, :], mask=column < WIDTH)


def cases(capability: int = 90) -> list[Case]:
    """Norms of hidden states, of a branch and of heads, for 8,192 tokens of the 31B; and rows of feed-forward width."""
    return [
        case
        for backward in (False, True)
        for case in (
            _case("norm, 5376", 8192, 5376, backward=backward),
            _case("norm, 21504", 8192, 21504, backward=backward),
            _case("norm without weight, 16 heads of 256", 8192 * 16, 256, backward=backward, weight=False),
            _case("add norm, 5376", 8192, 5376, backward=backward, adds=True),
        )
    ]


def _case(name: str, num_rows: int, width: int, *, backward: bool, weight: bool = True, adds: bool = False) -> Case:
    types = {"x": "*bf16", "rstd": "*fp32", "x_stride": "i32", "num_rows": "i32"}
    if weight:
        types |= {"weight": "*fp32"} | ({"of_weight": "*fp32"} if backward else {})
    if adds:
        types |= {"scale": "*fp32"} | ({"of_residual": "*bf16"} if backward else {"residual": "*bf16"})
    if backward:
        types |= {"grad": "*bf16", "of_x": "*bf16", "grad_stride": "i32"}
    else:
        types |= {"out": "*bf16", "residual_stride": "i32", "eps": "fp32"}
    rows, columns, num_warps = tile(width, *((2048,) if backward else ()))
    return row_case(
        f"{name}, backward" if backward else name,
        norm_backward if backward else norm_forward,
        types,
        {"WIDTH": width, "ROWS": rows, "COLUMNS": columns},
        operations=num_rows * width * (8 if backward else 4),
        bytes_=num_rows * width * 2 * (2 + backward + adds),
        num_warps=num_warps,
        # No norm of Gemma 4 is this wide: the weight's sums and two rows are too much for a thread's registers.
        spilled_bytes=320 if backward and width > 16_384 else 0,
    )
