"""Rows of a tensor as kernels read them: which part of them one program holds, and how many programs there are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from model.kernels.case import Case


class Tile(NamedTuple):
    """Rows that a program holds at a time, the power of 2 that holds their width, and warps for both."""

    rows: int
    columns: int
    num_warps: int


def tile(width: int, elements: int = 4096) -> Tile:
    """Whole rows of a width: several if they are narrow, so that every thread has some 32 numbers."""
    columns = triton.next_power_of_2(width)
    rows = max(1, elements // columns)
    return Tile(rows, columns, min(16, max(4, rows * columns // 1024)))


def as_rows(x: Tensor) -> Tensor:
    """A view [N, D] whose rows may lie apart; a copy only where no such view exists."""
    rows_ND = x.reshape(-1, x.shape[-1])
    return rows_ND if rows_ND.stride(1) == 1 else rows_ND.contiguous()


def resident_programs(device: torch.device) -> int:
    """How many programs go through all rows where each keeps sums: two for each multiprocessor, so that none waits."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def row_case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    operations: float,
    bytes_: float,
    num_warps: int = 4,
    spilled_bytes: int = 0,
) -> Case:
    """A case from the types of those arguments that are given; all but fractions are multiples of 16."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    return Case(
        name,
        kernel,
        signature,
        {name: constants.get(name) for name, type_ in signature.items() if type_ == "constexpr"},
        operations,
        bytes_,
        num_warps,
        divisible=tuple(name for name, type_ in types.items() if type_ != "fp32"),
        spilled_bytes=spilled_bytes,
    )
