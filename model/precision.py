"""The dtype in which norms, scores, losses and sums are computed: float32, or float64 in a float64 model.

A model in bfloat16 or float32 accumulates in float32. In float64, by which plans are proved equal,
nothing may fall back to float32: an error of 1e-8 would hide a wrong term. See docs/gemma4.md 13.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_MULTIPLIES_NARROW = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all narrower dtypes."""
    return torch.promote_types(dtype, torch.float32)


def upcast(x: Tensor) -> Tensor:
    """The tensor in its accumulation dtype; itself if it has that already."""
    return x.to(accumulation_dtype(x.dtype))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Products [B, M, N] of matrices [B, M, K] and [B, K, N], in the accumulation dtype; not differentiable."""
    if left.is_cuda and left.dtype != accumulation_dtype(left.dtype):
        return torch.bmm(left, right, out_dtype=accumulation_dtype(left.dtype))
    return upcast(left @ right)


def product_(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Fill `out`, in the accumulation dtype, with a scaled product of matrices that are perhaps narrower."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
    if out.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(left @ right)
    return out if scale == 1.0 else out.mul_(scale)


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add a product of matrices that are perhaps narrower to `out`, in the accumulation dtype."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right)
    if out.is_cuda:
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    return out.add_(left @ right)


def multiplies_narrow(device_type: str) -> bool:
    """Whether products in bfloat16 are fast: on a CPU without AVX-512 they take up to 70 times those of float32."""
    return device_type != "cpu" or _CPU_MULTIPLIES_NARROW
