"""Initialisation that any slice of a parameter can compute for itself.

Values come from fixed blocks of rows, each seeded by (seed, parameter name, block), so a
rank that holds a shard draws exactly the values one process would, and never the whole tensor.
Which tensor starts how is in docs/gemma4.md 12.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.encoders.clipped_linear import BOUNDS

ELEMENTS_PER_BLOCK = 1 << 20
_DECODER_LAYERS = "language_model.layers."
_ZEROS = ("bias", "std_bias", "per_dim_scale")


class Slice(NamedTuple):
    """A part of a named tensor of `shape`: `local`, to be filled in place, lies at `offset`."""

    local: Tensor
    name: str
    shape: torch.Size
    offset: tuple[int, ...]


Fill = Callable[[list[Slice]], None]
"""Gives slices of a model's tensors their values: drawn, or read from a checkpoint."""


Vector = Callable[[str, torch.Size], float]
"""The value at which all of a vector starts, by its name and shape."""


def reference_vector(name: str, shape: torch.Size) -> float:
    """Norm weights, scales and `layer_scalar` start at 1, biases and `per_dim_scale` at 0, clip bounds infinite."""
    last = name.rpartition(".")[2]
    return BOUNDS.get(last, 0.0 if last in _ZEROS else 1.0)


def stable_vector(num_layers: int) -> Vector:
    """A start for training from nothing: as the reference, but for two kinds of norms in the decoder's layers.

    Scores have no scale of their own (docs/gemma4.md 12): with norms of queries at 1 their standard deviation is the
    square root of the head width, and softmax picks one key. The norms after attention and feed-forward add a vector
    of this size to the hidden states whatever the weights before them, so that is where depth is made up for.
    """

    def vector(name: str, shape: torch.Size) -> float:
        module = name.removesuffix(".weight").rpartition(".")[2]
        if name.startswith(_DECODER_LAYERS) and module == "q_norm":
            return shape[0] ** -0.5
        if name.startswith(_DECODER_LAYERS) and module in ("post_attention_layernorm", "post_feedforward_layernorm"):
            return (2 * num_layers) ** -0.5
        return reference_vector(name, shape)

    return vector


def random_fill(seed: int, std: float, padding_row: int, vector: Vector = reference_vector) -> Fill:
    """Initial values as `init_slice_` draws them."""

    def fill(slices: Iterable[Slice]) -> None:
        for part in slices:
            init_slice_(*part, seed, std, padding_row, vector)

    return fill


def init_parameters(model: nn.Module, seed: int, std: float, padding_row: int) -> None:
    """Initialise whole parameters and buffers in place."""
    random_fill(seed, std, padding_row)(whole_slices(model))


def whole_slices(model: nn.Module) -> list[Slice]:
    """Every parameter and buffer of a model that lies on one device."""
    return [Slice(t.data, name, t.shape, (0,) * t.dim()) for name, t in initialised_tensors(model)]


def initialised_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, all of which are persistent, by qualified name."""
    buffers = [
        (f"{prefix}.{name}" if prefix else name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    return [*model.named_parameters(), *buffers]


@torch.no_grad()
def init_slice_(
    local: Tensor,
    name: str,
    shape: torch.Size,
    offset: tuple[int, ...],
    seed: int,
    std: float,
    padding_row: int,
    vector: Vector = reference_vector,
) -> None:
    """Fill `local`, the slice at `offset` of a tensor of `shape`, in place.

    Vectors are what `vector` says; everything else is N(0, std) with a zero `padding_row` in the two embedding tables.
    """
    if local.numel() == 0:
        return
    if len(shape) < 2:
        local.fill_(vector(name, shape))
        return
    columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], local.shape[1:], strict=True))
    rows_per_block = max(1, ELEMENTS_PER_BLOCK // shape[1:].numel())
    row, end = offset[0], offset[0] + local.shape[0]
    while row < end:
        block = row // rows_per_block
        start, stop = block * rows_per_block, min((block + 1) * rows_per_block, shape[0])
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator(local.device).manual_seed(int.from_bytes(digest) >> 1)
        values = torch.empty((stop - start, *shape[1:]), device=local.device)
        values.normal_(0.0, std, generator=generator)
        upto = min(stop, end)
        local[row - offset[0] : upto - offset[0]] = values[(slice(row - start, upto - start), *columns)]
        row = upto
    if "embed_tokens" in name and offset[0] <= padding_row < end:
        local[padding_row - offset[0]] = 0.0
