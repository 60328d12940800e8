"""Rotary position embedding: half-split pairs (j, j + H/2), default and proportional.

Full layers rotate only the first `partial_rotary_factor * H / 2` pairs; the exponent is still
divided by the whole head width. The other pairs have frequency zero, so they are passed
through untouched instead of being multiplied by cos 0 and sin 0. See docs/gemma4.md 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Gemma4Config, LayerType
from model.norm import rms_norm
from model.precision import accumulation_dtype
from model.triton_choice import by_triton


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of the rotated pairs, [T, R] with R <= H/2, in the activation dtype."""

    cos: Tensor
    sin: Tensor

    def select(self, rows: Tensor) -> RotaryTable:
        """The table at some of its positions."""
        return RotaryTable(self.cos[rows], self.sin[rows])


def inverse_frequencies(config: Gemma4Config, layer_type: LayerType, device: torch.device) -> Tensor:
    """Frequencies [R] in float32 of the pairs that rotate (docs/gemma4.md 4)."""
    if layer_type == "full_attention":
        head_dim, theta = config.global_head_dim, config.global_rope_theta
        num_rotated = int(config.partial_rotary_factor * head_dim // 2)
    else:
        head_dim, theta = config.head_dim, config.rope_theta
        num_rotated = head_dim // 2
    exponent = torch.arange(0, 2 * num_rotated, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / theta**exponent


def rotary_table(config: Gemma4Config, layer_type: LayerType, positions_T: Tensor, dtype: torch.dtype) -> RotaryTable:
    """cos and sin at some positions, of angles in float32, cast to the activation dtype (docs/gemma4.md 4, 13)."""
    frequencies = inverse_frequencies(config, layer_type, positions_T.device)
    angles_TR = positions_T[:, None] * frequencies.to(accumulation_dtype(dtype))
    return RotaryTable(angles_TR.cos().to(dtype), angles_TR.sin().to(dtype))


def axial_rotary_table(head_dim: int, theta: float, positions_T2: Tensor, dtype: torch.dtype) -> RotaryTable:
    """cos and sin [T, 2, H/4]: half of the head turns with the column, half with the row (docs/gemma4.md 4, axial)."""
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, device=positions_T2.device).float() / half)
    angles_T2R = positions_T2[..., None] * frequencies.to(accumulation_dtype(dtype))
    return RotaryTable(angles_T2R.cos().to(dtype), angles_T2R.sin().to(dtype))


def apply_axial_rotary(x_TNH: Tensor, table: RotaryTable) -> Tensor:
    """Rotate each half of the heads [T, N, H] by its own axis, half-split within the half."""
    first, second = x_TNH.unflatten(-1, (2, 2, -1)).unbind(dim=-2)
    cos, sin = table.cos[:, None], table.sin[:, None]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


def apply_rotary(x_TNH: Tensor, table: RotaryTable) -> Tensor:
    """Rotate heads [T, N, H]; rows of x and of the table correspond."""
    half, rotated = x_TNH.shape[-1] // 2, table.cos.shape[-1]
    cos, sin = table.cos[:, None, :], table.sin[:, None, :]
    first, first_rest = x_TNH[..., :rotated], x_TNH[..., rotated:half]
    second, second_rest = x_TNH[..., half : half + rotated], x_TNH[..., half + rotated :]
    return torch.cat((first * cos - second * sin, first_rest, second * cos + first * sin, second_rest), dim=-1)


def norm_rotary(x_TNH: Tensor, weight_H: Tensor | None, table: RotaryTable, eps: float) -> Tensor:
    """Heads [T, N, H], each normed, then rotated."""
    if by_triton(x_TNH):
        from model.kernels.rotary import fused_norm_rotary

        return fused_norm_rotary(x_TNH, weight_H, table.cos, table.sin, eps)
    return apply_rotary(rms_norm(x_TNH, weight_H, eps), table)
