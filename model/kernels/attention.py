"""Attention in Triton, forward and backward, for every width of head and every mask of intervals.

The contract is that of `blocked` and `blocked_partial` in `model/attention_kernels.py`, which these are held to. Scores
are made in float32 and never leave the chip. The backward makes them again: for the gradients of queries, then of keys,
then of values. Two of these in one program would need more registers than a thread has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.attention_programs import backward_keys, backward_queries, forward
from model.kernels.case import Case
from model.masks import AttentionMask
from model.tiles import KEYS


def triton_attention(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    """Outputs [T_queries, N, H]; query head n reads KV head n // (N / K)."""
    return _Attention.apply(q_TNH, k_BSKH, v_BSKH, mask)[0]


def triton_partial(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Outputs over some of the keys, and the log-sum-exp [T, N] by which parts are merged; a query may see nothing."""
    return _Attention.apply(q_TNH, k_BSKH, v_BSKH, mask)


class Sizes(NamedTuple):
    """Queries and keys of a tile, warps of a program, and stages in which its loads run ahead."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def _parts(*sizes: tuple[int, int, int, int]) -> dict[str, Sizes]:
    return dict(zip(("forward", "queries", "keys", "values"), (Sizes(*four) for four in sizes), strict=True))


@torch.library.custom_op("gemwright::attention", mutates_args=())
def outputs(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    tiles: Tensor,
    first_key_T: Tensor,
    last_key_T: Tensor,
    num_keys: int,
) -> tuple[Tensor, Tensor]:
    """Outputs [T_queries, N, H] and log-sum-exp [T_queries, N], as an operation of torch's.

    Selective recomputation knows it by its name, and keeps what it gives.
    """
    q, k, v = map(_last_axis_dense, (q_TNH, k_TKH, v_TKH))
    out_TNH = q.new_empty(q.shape)
    lse_TN = q.new_empty(q.shape[:2], dtype=torch.float32)
    forward[(len(tiles) * q.shape[1],)](
        *(q, k, v, out_TNH, lse_TN, tiles, first_key_T, last_key_T),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(out_TNH)),
        *(len(tiles), q.shape[1], num_keys),
        **_constants(q, k, sizes_of("forward", q)),
    )
    return out_TNH, lse_TN


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        table = mask.tiles.queries[sizes_of("forward", q_TNH).queries]
        intervals = (mask.tiles.first_key_T, mask.tiles.last_key_T)
        out_TNH, lse_TN = outputs(q_TNH, k_BSKH.flatten(0, 1), v_BSKH.flatten(0, 1), table, *intervals, mask.num_keys)
        ctx.mask = mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_TNH, k_BSKH, v_BSKH, out_TNH, lse_TN)
        return out_TNH, lse_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor | None, grad_lse_TN: Tensor | None) -> tuple[Tensor | None, ...]:
        q_TNH, k_BSKH, v_BSKH, out_TNH, lse_TN = ctx.saved_tensors
        if grad_TNH is None:
            grad_TNH = torch.zeros_like(out_TNH)
        dot_TN = (grad_TNH.float() * out_TNH.float()).sum(dim=-1)
        if grad_lse_TN is not None:
            dot_TN -= grad_lse_TN
        # A query that sees nothing: no share of it is made, so any number will do.
        lse_TN = lse_TN.masked_fill(lse_TN == float("-inf"), 0.0)
        flat = (q_TNH, k_BSKH.flatten(0, 1), v_BSKH.flatten(0, 1), grad_TNH)
        (q, k, v, grad), mask = map(_last_axis_dense, flat), ctx.mask
        of_q, of_k, of_v = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
        intervals = (mask.tiles.first_key_T, mask.tiles.last_key_T)
        strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(grad))
        numbers = (q.shape[1], mask.num_keys)

        sizes = sizes_of("queries", q)
        tiles = mask.tiles.queries[sizes.queries]
        backward_queries[(len(tiles) * q.shape[1],)](
            *(q, k, v, grad, lse_TN, dot_TN, of_q, tiles, *intervals, *strides, *_strides(of_q), len(tiles), *numbers),
            **_constants(q, k, sizes),
        )
        for part in ("keys", "values"):
            sizes = sizes_of(part, q)
            count = triton.cdiv(mask.num_keys, sizes.keys)
            targets = (of_k, None) if part == "keys" else (None, of_v)
            backward_keys[(mask.batch_size * count, k.shape[1])](
                *(q, k, v, grad, lse_TN, dot_TN, *targets, mask.tiles.of_keys, *intervals),
                *(*strides, *_strides(of_k), count, *numbers),
                SPAN=KEYS,
                **_constants(q, k, sizes),
            )
        return of_q, of_k.view(k_BSKH.shape), of_v.view(v_BSKH.shape), None


def _last_axis_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x_TNH: Tensor) -> tuple[int, int]:
    return x_TNH.stride(0), x_TNH.stride(1)


def _constants(q_TNH: Tensor, k_TKH: Tensor, sizes: Sizes) -> dict[str, int]:
    width = q_TNH.shape[-1]
    return {
        "GROUP": q_TNH.shape[1] // k_TKH.shape[1],
        "WIDTH": width,
        "COLUMNS": columns(width),
        "QUERIES": sizes.queries,
        "KEYS": sizes.keys,
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
    }


def columns(width: int) -> int:
    """The power of 2 that holds a head, of at least the 16 that a product needs."""
    return max(16, triton.next_power_of_2(width))


def sizes_of(part: str, q_TNH: Tensor) -> Sizes:
    """The sizes of a part for heads like these where they are."""
    capability = 10 * torch.cuda.get_device_capability(q_TNH.device)[0] if q_TNH.is_cuda else 90
    return tile_sizes(part, columns(q_TNH.shape[-1]), capability)


_SIZES = {
    # compute capability: of heads up to a width, the sizes by part
    80: {
        128: _parts((128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        256: _parts((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        512: _parts((64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 8, 2), (16, 64, 8, 2)),
    },
    90: {
        128: _parts((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        256: _parts((128, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        512: _parts((64, 32, 8, 2), (64, 16, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2)),
    },
    100: {
        128: _parts((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        256: _parts((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 2), (16, 64, 8, 2)),
        512: _parts((64, 32, 8, 2), (64, 16, 8, 2), (16, 32, 8, 2), (32, 32, 8, 1)),
    },
}
"""What fits shared memory and registers in 16 bits, by what the compiler says of each (docs/kernels.md): the largest
tiles that spill nothing, or for heads of 512, whose sums alone take half of a thread's registers, next to nothing."""
_SPILLED = 64
"""Bytes that a thread may spill for heads of 512."""


def tile_sizes(part: str, width: int, capability: int) -> Sizes:
    """Sizes of a part (forward, queries, keys or values) on a kind of GPU; a newer one is taken for the last known.

    width: of a head, at most 512.
    """
    known = max(known for known in _SIZES if known <= max(capability, min(_SIZES)))
    return _SIZES[known][next(most for most in _SIZES[known] if width <= most)][part]


def cases(capability: int = 90) -> list[Case]:
    """Attention of 8,192 tokens of the 31B, sliding and full, and over the small heads of a tower."""
    return [
        case
        for name, shape in (
            ("sliding, 256", _Shape(256, 32, 16, 1024)),
            ("full, 512", _Shape(512, 32, 4, None)),
            ("heads of 72", _Shape(72, 16, 16, None)),
        )
        for case in _cases(name, shape, capability)
    ]


class _Shape(NamedTuple):
    width: int
    num_heads: int
    num_kv_heads: int
    window: int | None

    @property
    def pairs(self) -> int:
        """Visible pairs of all heads."""
        tokens, window = 8192, self.window or 8192
        return self.num_heads * (tokens * window - window * (window - 1) // 2)


def _cases(name: str, shape: _Shape, capability: int) -> list[Case]:
    kernels = {
        "forward": (forward, "forward", 2),
        "queries": (backward_queries, "gradients of queries", 3),
        "keys": (backward_keys, "gradients of keys", 3),
        "values": (backward_keys, "gradients of values", 2),
    }
    found = []
    for part, (kernel, said, products) in kernels.items():
        sizes = tile_sizes(part, columns(shape.width), capability)
        constants: dict[str, Any] = {
            "GROUP": shape.num_heads // shape.num_kv_heads,
            "WIDTH": shape.width,
            "COLUMNS": columns(shape.width),
            "QUERIES": sizes.queries,
            "KEYS": sizes.keys,
            "SPAN": KEYS,
            "of_k": None if part == "values" else "given",
            "of_v": None if part == "keys" else "given",
        }
        signature, values = {}, {}
        for argument in kernel.arg_names:
            if argument in constants and constants[argument] != "given":
                signature[argument], values[argument] = "constexpr", constants[argument]
            elif argument in ("tiles", "spans", "first_key", "last_key"):
                signature[argument] = "*i32"
            elif argument.startswith("num_") or argument.endswith(("_token", "_head")):
                signature[argument] = "i32"
            else:
                signature[argument] = "*fp32" if argument in ("lse", "dot") else "*bf16"
        heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * 8192 * shape.width
        found.append(
            Case(
                f"attention, {name}: {said}",
                kernel,
                signature,
                values,
                operations=2 * products * shape.pairs * shape.width,
                bytes=2 * heads,
                num_warps=sizes.num_warps,
                num_stages=sizes.num_stages,
                divisible=tuple(
                    n for n, kind in signature.items() if kind[0] == "*" or n.endswith(("_token", "_head"))
                ),
                spilled_bytes=_SPILLED if columns(shape.width) == 512 else 0,
            )
        )
    return found
