"""Images cut into patches (docs/gemma4.md 10.1)."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy, uint8

BUDGETS = (70, 140, 280, 560, 1120)
"""Soft tokens an image may take."""

_UNIT = (np.arange(256) * (1 / 255)).astype(np.float32)
"""Pixel value -> [0, 1]; no mean, no standard deviation."""


def fit(width: int, height: int, budget: int, cell: int) -> tuple[int, int]:
    """Columns and rows of the largest grid of at most `budget` cells, each `cell` pixels square, in the image's ratio.

    An image too narrow for one cell across becomes a line of `budget` cells.
    """
    # In this order of operations an image that fits as it is keeps its size, and all roundings are the reference's.
    scale = math.sqrt(budget * cell**2 / (width * height))
    columns, rows = int(scale * width / cell), int(scale * height / cell)
    if rows == 0:
        return budget, 1
    if columns == 0:
        return 1, budget
    return columns, rows


def to_bytes(values: Tensor) -> Tensor:
    """The bytes of pixels that were made into these values in [0, 1]."""
    return (values * 255).round().to(uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """float32 values in [0, 1] of uint8 pixels."""
    return from_numpy(_UNIT[pixels.numpy()])


def cut_patches(image: Image.Image, budget: int, cell: int, patch: int) -> tuple[Tensor, Tensor]:
    """Resize to whole cells of `cell` pixels, then cut patches of `patch` pixels, row by row.

    Returns float32 values [T, patch * patch * 3] in [0, 1], each patch as (row, column, channel), and int64 positions
    [T, 2] of the patches as (x, y). `patch` divides `cell`; a cell is one soft token.
    """
    columns, rows = fit(*image.size, budget, cell)
    resized = image.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    columns, rows = columns * cell // patch, rows * cell // patch
    pixels = np.asarray(resized).reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    y, x = np.indices((rows, columns))
    values = from_bytes(from_numpy(pixels.reshape(rows * columns, -1)))
    return values, from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2))
