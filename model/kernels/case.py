"""One kernel at one size, as its compiler is asked for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A kernel with all that is fixed when it is compiled, and the work of one call at a real size."""

    name: str
    """What the table of budgets calls it, for example `attention forward, 512`."""
    kernel: Any
    """A function under `triton.jit`."""
    signature: dict[str, str]
    """The type of each argument in order: `*bf16`, `*i32`, `fp32`, `i32`, or `constexpr`."""
    constants: dict[str, Any]
    """Values of the arguments that are `constexpr`."""
    operations: float
    """Multiplications and additions of one call, of matrix products if it has any."""
    bytes: float
    """Bytes that one call reads and writes in the GPU's memory."""
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = field(default=())
    """Arguments that are multiples of 16: addresses, and sizes that allow wide loads."""
    spilled_bytes: int = 0
    """How many bytes a thread may spill; more than none is a decision, which the kernel's file explains."""
