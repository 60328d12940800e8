"""Whether kernels of `model/kernels` take the place of torch's: a choice of the process, as torch's own backends are.

The plain path asks, tensor by tensor, and imports a kernel where it is used first: no Triton is needed for what is
computed by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

_DEVICES: set[str] = set()


def use_triton(*device_types: str) -> None:
    """From here on Triton's kernels compute what lies on devices of these types, and torch all else."""
    _DEVICES.clear()
    _DEVICES.update(device_types)


@contextmanager
def triton_for(*device_types: str) -> Iterator[None]:
    """The same for as long as the context lasts."""
    before = tuple(_DEVICES)
    use_triton(*device_types)
    try:
        yield
    finally:
        use_triton(*before)


def triton_takes(device_type: str) -> bool:
    """Whether Triton's kernels are chosen for devices of a type."""
    return device_type in _DEVICES


def by_triton(x: Tensor) -> bool:
    """Whether Triton's kernels take a tensor: in float64 none does."""
    return x.device.type in _DEVICES and x.dtype != torch.float64


def attends_by_triton(device_type: str, dtype: torch.dtype) -> bool:
    """Whether attention is Triton's: in 16 bits, for which matrix units and the sizes of its tiles are made."""
    return device_type in _DEVICES and dtype in (torch.bfloat16, torch.float16)


def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
