"""Both passes of the loss over a tile of scores: the soft cap with the sums that it gives, and the gradient of scores.

Scores come divided by the soft cap, as the head's product makes them, and stay float32. A row of the vocabulary is too
wide for one program: each has a part of a row and writes its sum, and the sums are added up in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.case import Case
from model.kernels.rows import row_case

COLUMNS = 4096
"""How much of a row one program holds."""
NUM_WARPS = 8


def cap_and_sum(scores_TB: Tensor, labels_T: Tensor, start: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Sums [T] of exponentials of capped scores, and the label's capped score [T]; the scores become their tanh.

    scores_TB: a block of the vocabulary from `start` on, divided by the soft cap; float32, rows may lie apart. A label
    outside of the block has 0.
    """
    num_tokens, width = scores_TB.shape
    pieces = triton.cdiv(width, COLUMNS)
    sums = scores_TB.new_empty((num_tokens, pieces))
    labelled_T = scores_TB.new_zeros(num_tokens)
    if scores_TB.numel():
        cap_and_sum_pieces[(num_tokens, pieces)](
            *(scores_TB, labels_T, sums, labelled_T, scores_TB.stride(0), start, softcap, width, COLUMNS),
            num_warps=NUM_WARPS,
        )
    return sums.sum(dim=1), labelled_T


def cap_gradient(
    capped_TB: Tensor,
    labels_T: Tensor,
    start: int,
    softcap: float,
    of_all_T: Tensor,
    of_label_T: Tensor,
    out_TB: Tensor,
) -> None:
    """Fill `out_TB` with the gradient of scores before the soft cap, from what `cap_and_sum` made of them.

    The gradient of a capped score is exp(score) * of_all, at the label + of_label. `out_TB` is of any dtype, and may be
    `capped_TB` itself.
    """
    num_tokens, width = capped_TB.shape
    if capped_TB.numel():
        cap_gradient_pieces[(num_tokens, triton.cdiv(width, COLUMNS))](
            *(capped_TB, labels_T, of_all_T.contiguous(), of_label_T.contiguous(), out_TB),
            *(capped_TB.stride(0), out_TB.stride(0), start, softcap, width, COLUMNS),
            num_warps=NUM_WARPS,
        )


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """The hyperbolic tangent, for small numbers by its series, so that digits do not cancel.

    Triton has one too, which its interpreter does not know.
    """
    decay = tl.exp(-2 * tl.abs(x))
    large = 1 - 2 * decay / (1 + decay)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@triton.jit
def cap_and_sum_pieces(
    scores: tl.tensor,
    labels: tl.tensor,
    sums: tl.tensor,
    labelled: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    softcap: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """A part of a row: the tanh in place, one sum; and the label's score, if it is here."""
    token, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    capped = tanh(tl.load(scores + token * stride + column, mask=column < width, other=0.0))
    tl.store(scores + token * stride + column, capped, mask=column < width)
    score = softcap * capped
    total = tl.sum(tl.where(column < width, tl.exp(score), 0.0))
    tl.store(sums + token * tl.num_programs(1) + piece, total)
    label = tl.load(labels + token) - first
    is_label = (column == label) & (column < width)
    here = (label >= piece * COLUMNS) & (label < (piece + 1) * COLUMNS)
    tl.store(labelled + token, tl.sum(tl.where(is_label, score, 0.0)), mask=here)


@triton.jit
def cap_gradient_pieces(
    capped: tl.tensor,
    labels: tl.tensor,
    of_all: tl.tensor,
    of_label: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    first: tl.tensor,
    softcap: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """A part of a row: through the exponential and the label, then through the tanh."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bounded = tl.load(capped + token * stride + column, mask=column < width, other=0.0)
    at_label = tl.where(column == tl.load(labels + token) - first, tl.load(of_label + token), 0.0)
    grad = tl.exp(softcap * bounded) * tl.load(of_all + token) + at_label
    grad *= 1 - bounded * bounded
    tl.store(out + token * out_stride + column, grad.to(out.dtype.element_ty), mask=column < width)


def cases(capability: int = 90) -> list[Case]:
    """One tile of scores: the whole vocabulary for 256 tokens, 32 of which are a step of 8,192."""
    tokens, width = 256, 262_144
    shared = {"labels": "*i64", "stride": "i32", "first": "i32", "softcap": "fp32", "width": "i32"}
    forward = shared | {"scores": "*fp32", "sums": "*fp32", "labelled": "*fp32"}
    backward = shared | {"capped": "*fp32", "of_all": "*fp32", "of_label": "*fp32", "out_stride": "i32"}
    return [
        row_case(
            name,
            kernel,
            types,
            {"COLUMNS": COLUMNS},
            operations=tokens * width * operations,
            bytes_=tokens * width * bytes_,
            num_warps=NUM_WARPS,
        )
        for name, kernel, types, operations, bytes_ in (
            ("cap and sum, 256 tokens", cap_and_sum_pieces, forward, 20, 8),
            ("cap gradient, 256 tokens", cap_gradient_pieces, backward | {"out": "*bf16"}, 7, 6),
            ("cap gradient in float32, 256 tokens", cap_gradient_pieces, backward | {"out": "*fp32"}, 7, 8),
        )
    ]
