"""The dtype in which norms, scores, losses and sums are computed: float32, or float64 in a float64 model.

A model in bfloat16 or float32 accumulates in float32. In float64, by which plans are proved equal,
nothing may fall back to float32: an error of 1e-8 would hide a wrong term. See docs/gemma4.md 13.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all narrower dtypes."""
    return torch.promote_types(dtype, torch.float32)


def upcast(x: Tensor) -> Tensor:
    """The tensor in its accumulation dtype; itself if it has that already."""
    return x.to(accumulation_dtype(x.dtype))
