"""Moments of an optimizer in 16 or 8 bits, where they take half or a quarter of the memory.

A number of 8 bits is a share of the largest of its block, a run of at most 64 of a row: 4 bits of exponent and 3 of
fraction under a sign, or 4 of fraction for the root of the second moment, which has none. Blocks never straddle ranks,
so that no number depends on how a matrix is split.

A moment changes by a few percent a step, or a thousandth, which rounding to the nearest would lose. What is rounded up
therefore turns with the step and the place in the whole parameter, by a sequence that fills [0, 1) evenly (Weyl 1916):
over steps a moment is right on average. There is no random state, and meshes agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import ConfigError
from parallel.dtensors import local_part
from parallel.torch_private import global_offset

_BLOCK, _LEAST_BLOCK = 64, 4
_CHUNK = 1 << 22
"""Numbers that are wide at a time."""
_EXPONENT, _FRACTION = 127 - 15, 23
"""The exponent that code 0 stands for, of shares of 2^-15 on; and bits of a fraction in float32."""
_TURNS = (math.sqrt(2), math.sqrt(3), math.sqrt(5), math.sqrt(7))
"""How far a place along each axis turns the sequence, counted from the last axis; and a step, by the golden ratio."""
_GOLDEN = (math.sqrt(5) - 1) / 2


def is_narrowed(parameter: Tensor, dtype: str) -> bool:
    """Whether moments of a parameter are kept in fewer bits: matrices and stacks of them, but no vectors or filters."""
    if dtype == "float32" or parameter.dim() not in (2, 3):
        return False
    return dtype == "bfloat16" or block_size(parameter.shape[-1]) >= _LEAST_BLOCK


def block_size(width: int) -> int:
    """Numbers of a row that share a scale: a divisor of what any split of the row into 2, 3, ..., 16 parts leaves."""
    part = width // math.gcd(width, 48)
    return max(size for size in range(1, _BLOCK + 1) if part % size == 0)


def bytes_a_number(parameter: Tensor, dtype: str, full: int) -> float:
    """Bytes of one moment of a parameter for each of its numbers; `full` are those of one that is not narrowed."""
    if not is_narrowed(parameter, dtype):
        return full
    return 2 if dtype == "bfloat16" else 1 + 4 / block_size(parameter.shape[-1])


class Moment:
    """One moment of a parameter, sharded as the parameter is; `tensors` are what a checkpoint keeps, by name."""

    def __init__(self, parameter: Tensor, name: str, dtype: str, *, squares: bool) -> None:
        """squares: whether it is a mean of squares, which are never negative and whose roots are what matters."""
        self.squares, self.block = squares, block_size(parameter.shape[-1])
        if dtype == "float8" and local_part(parameter).shape[-1] % self.block:
            raise ConfigError(
                f"optimizer.state_dtype=float8 keeps rows of {parameter.shape[-1]} in blocks of {self.block}, but a "
                f"rank of this mesh has {local_part(parameter).shape[-1]} of a row; nearest legal: bfloat16."
            )
        if dtype == "bfloat16":
            self.tensors = {name: torch.zeros_like(parameter, dtype=torch.bfloat16)}
        else:
            codes = torch.zeros_like(parameter, dtype=torch.uint8)
            self.tensors = {name: codes, f"{name}_scale": _per_block(codes, self.block)}
        self._narrow = [local_part(tensor) for tensor in self.tensors.values()]

    def read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows [R, W] of this rank's part, all leading axes flattened."""
        narrow, *scale = (as_rows(tensor)[rows] for tensor in self._narrow)
        if not scale:
            return narrow.to(dtype)
        codes = narrow.int()
        if self.squares:
            shares = _shares(codes, 4)
        else:
            magnitudes = codes & 127
            shares = _shares(magnitudes, 3).mul_((magnitudes != 0) * (1 - 2 * (codes >> 7)))
        values = shares.unflatten(-1, (-1, self.block)).mul_(scale[0][..., None]).flatten(-2)
        return (values.square_() if self.squares else values).to(dtype)

    def write(self, rows: slice, values: Tensor, turn: Tensor) -> None:
        """Keep some rows, each number rounded up or down by its turn in [0, 1).

        One that lies a share s of a last place above the code below it is rounded up where s + turn >= 1.
        """
        narrow, *scale = (as_rows(tensor)[rows] for tensor in self._narrow)
        wide = values.float()
        if not scale:
            bits = wide.view(torch.int32) + (turn * (1 << 16)).int()
            narrow.copy_(bits.bitwise_and_(-(1 << 16)).view(torch.float32))
            return
        magnitudes = (wide.sqrt() if self.squares else wide.abs()).unflatten(-1, (-1, self.block))
        largest = magnitudes.amax(-1)
        scale[0].copy_(largest)
        shares = magnitudes.div_(largest.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).flatten(-2)
        codes = _codes(shares, turn, 4 if self.squares else 3)
        narrow.copy_(codes if self.squares else codes + 128 * wide.signbit())


def chunks(parameter: Tensor) -> Iterator[slice]:
    """Rows of this rank's part of a parameter, some at a time."""
    rows, width = as_rows(local_part(parameter)).shape
    step = max(1, _CHUNK // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def turns(parameter: Tensor, rows: slice, step: Tensor) -> Tensor:
    """What `Moment.write` takes for some rows of this rank's part at a step, which is not waited for."""
    local = local_part(parameter)
    offsets = global_offset(parameter) if isinstance(parameter, DTensor) else (0,) * parameter.dim()
    along = [
        turn * (offset + torch.arange(size, dtype=torch.float64, device=local.device))
        for turn, offset, size in zip(_TURNS, reversed(offsets), reversed(local.shape), strict=False)
    ]
    lead = along[1] if len(along) == 2 else (along[2][:, None] + along[1]).flatten()
    lead = (lead[rows] + _GOLDEN * step.double()).frac_()
    return (lead[:, None].float() + along[0].frac_().float()).frac_()


def as_rows(tensor: Tensor) -> Tensor:
    """This rank's part as rows [R, W], all leading axes flattened; a view, by which it can be changed."""
    return tensor.detach().view(-1, tensor.shape[-1])


def _per_block(codes: Tensor, block: int) -> Tensor:
    """A float32 number for each block, sharded as the codes are."""
    local = local_part(codes)
    scales = torch.zeros(*local.shape[:-1], local.shape[-1] // block, device=local.device)
    if not isinstance(codes, DTensor):
        return scales
    whole = torch.empty(*codes.shape[:-1], codes.shape[-1] // block, device="meta")
    return DTensor.from_local(
        scales, codes.device_mesh, codes.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _codes(shares: Tensor, turn: Tensor, fraction: int) -> Tensor:
    """Codes of shares in [0, 1]: their leading bits in float32, from the least exponent on."""
    dropped = _FRACTION - fraction
    bits = shares.view(torch.int32) + (turn * (1 << dropped)).int()
    return (bits.bitwise_right_shift_(dropped) - (_EXPONENT << fraction)).clamp_(min=0)


def _shares(codes: Tensor, fraction: int) -> Tensor:
    """The shares that codes stand for."""
    return (codes + (_EXPONENT << fraction)).bitwise_left_shift_(_FRACTION - fraction).view(torch.float32)
