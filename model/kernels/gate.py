"""The gate of a feed-forward block in one pass: `gelu(gate) * up`, with gelu by its tanh approximation.

The approximation is `x / 2 * (1 + tanh(u))`, which is `x * sigmoid(2 u)`: one exponential, and no sum of numbers that
cancel. All of it is float32 between one read and one write.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.case import Case
from model.kernels.rows import Tile, as_rows, row_case

LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
"""`2 u` is `LINEAR * x + CUBIC * x^3`."""


def fused_gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """Features `up` times the gelu of `gate`, contiguous; rows of both may lie apart, like halves of wider ones."""
    return _GatedGelu.apply(gate, up)


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gate_TF, up_TF = as_rows(gate), as_rows(up)
        out_TF = gate_TF.new_empty(gate_TF.shape)
        if out_TF.numel():
            (num_rows, width), (rows, columns, num_warps) = gate_TF.shape, part(gate_TF.shape[1])
            gate_forward[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
                *(gate_TF, up_TF, out_TF, gate_TF.stride(0), up_TF.stride(0), num_rows),
                *(width, rows, columns),
                num_warps=num_warps,
            )
        return out_TF.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_TF, gate_TF, up_TF = as_rows(grad), as_rows(gate), as_rows(up)
        of_gate, of_up = gate_TF.new_empty(gate_TF.shape), up_TF.new_empty(up_TF.shape)
        if of_gate.numel():
            (num_rows, width), (rows, columns, num_warps) = gate_TF.shape, part(gate_TF.shape[1])
            gate_backward[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
                *(grad_TF, gate_TF, up_TF, of_gate, of_up),
                *(grad_TF.stride(0), gate_TF.stride(0), up_TF.stride(0), num_rows),
                *(width, rows, columns),
                num_warps=num_warps,
            )
        return of_gate.view(gate.shape), of_up.view(up.shape)


def part(width: int) -> Tile:
    """What one program holds of rows whose numbers are on their own: a part that divides the width, if one does."""
    columns = max(64, math.gcd(width, 1024))
    return Tile(2048 // columns, columns, 4)


@triton.jit
def gate_forward(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A part of some rows: `gate * sigmoid(2 u) * up`."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    values = x * tl.sigmoid(x * (LINEAR + CUBIC * x * x)) * factor
    tl.store(out + row * WIDTH + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    of_gate: tl.tensor,
    of_up: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Both gradients of a part of some rows."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x * (LINEAR + CUBIC * x * x))
    slope = share + x * share * (1 - share) * (LINEAR + 3 * CUBIC * x * x)
    tl.store(of_gate + row * WIDTH + column, (g * factor * slope).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + row * WIDTH + column, (g * x * share).to(of_up.dtype.element_ty), mask=inside)


def cases(capability: int = 90) -> list[Case]:
    """Gates of 8,192 tokens: of the 31B, and of the 26B-A4B's experts, whose two halves are one product's."""
    return [
        _case(name, num_rows, width, backward=backward)
        for backward in (False, True)
        for name, num_rows, width in (("gate, 21504", 8192, 21504), ("gate of experts, 704", 65536, 704))
    ]


def _case(name: str, num_rows: int, width: int, *, backward: bool) -> Case:
    types = {"gate": "*bf16", "up": "*bf16", "gate_stride": "i32", "up_stride": "i32", "num_rows": "i32"}
    types |= (
        {"grad": "*bf16", "of_gate": "*bf16", "of_up": "*bf16", "grad_stride": "i32"} if backward else {"out": "*bf16"}
    )
    rows, columns, num_warps = part(width)
    return row_case(
        f"{name}, backward" if backward else name,
        gate_backward if backward else gate_forward,
        types,
        {"WIDTH": width, "ROWS": rows, "COLUMNS": columns},
        operations=num_rows * width * (18 if backward else 9),
        bytes_=num_rows * width * 2 * (5 if backward else 3),
        num_warps=num_warps,
    )
