"""Which of Triton's two ways the tests of a file need; a process has one of them."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

NARROW = {torch.float16: 1e-6, torch.bfloat16: 2.0**-8}
"""How much further than the plain path a kernel may be off, besides a twentieth: the interpreter cuts float32 to
bfloat16, where a GPU rounds to the nearest."""


def requires_interpreter() -> None:
    """Skip the file that calls this, unless kernels run on a CPU. To be called before kernels are imported."""
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are run by Triton's interpreter: make test-kernels", allow_module_level=True)


def requires_compiler() -> None:
    """Skip the file that calls this, unless kernels are compiled. To be called before kernels are imported."""
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are compiled by Triton: make test-kernels", allow_module_level=True)
