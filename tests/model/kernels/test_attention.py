"""Attention in Triton: values and gradients of the blocked kernel, and nearer to float64 where numbers are narrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_kernels import blocked, blocked_partial
from model.masks import AttentionMask, attention_mask, segment_mask
from tests.harness.compare import hold, relative_error
from tests.model.kernels.conftest import requires_interpreter

requires_interpreter()

from model.kernels.attention import triton_attention, triton_partial

Attention = Callable[..., Any]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def documents(length: int) -> Tensor:
    ids = torch.zeros(2, length, dtype=torch.long)
    ids[0, length // 3 :] = 1
    ids[0, length // 2 :] = 7
    ids[1, 1:] = 5
    return ids


def pictures(length: int) -> Tensor:
    vision = torch.zeros(2, length, dtype=torch.bool)
    vision[0, 3 : length // 2] = True
    vision[1, length // 2 :] = True
    return vision


def some_of(mask: AttentionMask) -> AttentionMask:
    drawn = torch.rand(mask.num_queries, generator=torch.Generator().manual_seed(1))
    return mask.select((drawn < 0.3).nonzero()[:, 0])


def blind(mask: AttentionMask) -> AttentionMask:
    """Some of the queries see nothing, as where keys of another rank are all later."""
    first, last = mask.first_key_T.clone(), mask.last_key_T.clone()
    first[::3], last[::3] = mask.num_keys, -1
    first[70:], last[70:] = mask.num_keys, -1
    return AttentionMask(mask.batch_T, mask.position_T, first, last, mask.batch_size, mask.num_keys)


MASKS = {
    "causal": attention_mask(2, 150),
    "window": attention_mask(2, 150, window=20),
    "documents": attention_mask(2, 150, document_ids_BS=documents(150)),
    "window, pictures": attention_mask(2, 90, window=9, document_ids_BS=documents(90), vision_BS=pictures(90)),
    "few queries": some_of(attention_mask(2, 150, document_ids_BS=documents(150))),
    "segments": segment_mask([70, 1, 19]),
    "two": attention_mask(1, 2),
    "blind": blind(attention_mask(1, 90)),
}


def inputs(mask: AttentionMask, heads: int, kv_heads: int, width: int) -> list[Tensor]:
    keys = (mask.batch_size, mask.num_keys, kv_heads, width)
    scale = width**-0.25
    return [scale * drawn(mask.num_queries, heads, width), scale * drawn(*keys).flip(1), drawn(*keys).flip(0)]


def outputs(attention: Attention, given: list[Tensor], mask: AttentionMask) -> list[Tensor]:
    """Values, then gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    found = attention(*leaves, mask)
    parts = [found] if isinstance(found, Tensor) else [*found]
    grads = [drawn(*part.shape).flip(0).to(part.dtype) for part in parts]
    total = sum((part * grad).nan_to_num(neginf=0.0).sum() for part, grad in zip(parts, grads, strict=True))
    assert isinstance(total, Tensor)
    return [*(part.detach() for part in parts), *torch.autograd.grad(total, leaves)]


def compare(kind: str, ours: Attention, plain: Attention, given: list[Tensor], mask: AttentionMask) -> None:
    exact = outputs(plain, given, mask)
    found = outputs(ours, [x.float() for x in given], mask)
    for a, true in zip(found, exact, strict=True):
        # The backward makes scores in tiles of another shape: their sums of up to 512 products differ by rounding.
        hold(f"kernels, {kind} in float32", relative_error(_seen(a), _seen(true)), 1e-5)
    for dtype in (torch.float16,):  # the interpreter has no product of bfloat16
        rounded = [x.to(dtype) for x in given]
        exact = outputs(plain, [x.double() for x in rounded], mask)
        found, expected = (outputs(f, rounded, mask) for f in (ours, plain))
        for a, b, true in zip(found, expected, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            bound = 1.25 * relative_error(_seen(b), _seen(true)) + 1e-6
            hold(f"kernels, {kind} in {dtype} beside plain", relative_error(_seen(a), _seen(true)), bound)


def _seen(x: Tensor) -> Tensor:
    """The same infinities count as nothing."""
    return x.double().nan_to_num(neginf=-1.0)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "blind"])
def test_values_and_gradients(name: str) -> None:
    mask = MASKS[name]
    compare("attention", triton_attention, blocked, inputs(mask, 4, 2, 16), mask)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 72), (8, 1, 64), (2, 1, 256), (2, 1, 512)])
def test_every_width_of_head(heads: int, kv_heads: int, width: int) -> None:
    mask = attention_mask(1, 70, window=40)
    compare(f"attention, heads of {width},", triton_attention, blocked, inputs(mask, heads, kv_heads, width), mask)


@pytest.mark.parametrize("name", ["blind", "few queries"])
def test_parts_with_their_log_sum_exp(name: str) -> None:
    mask = MASKS[name]
    given = inputs(mask, 4, 2, 16)
    compare("partial attention", triton_partial, blocked_partial, given, mask)
    if name == "blind":
        q, k, v = (x.float() for x in given)
        out, lse = triton_partial(q, k, v, mask)
        assert not out[::3].any() and (lse[::3] == float("-inf")).all() and torch.isfinite(lse[1]).all()


def test_rows_may_lie_apart() -> None:
    mask = MASKS["window"]
    dense = [x.float() for x in inputs(mask, 4, 2, 16)]
    apart = [torch.cat((x, x), dim=-1)[..., :16] for x in dense]
    assert not any(x.is_contiguous() for x in apart)
    for a, b in zip(outputs(triton_attention, apart, mask), outputs(triton_attention, dense, mask), strict=True):
        assert torch.equal(a, b)
