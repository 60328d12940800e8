"""Norm and rotary embedding in one pass: values and gradients of both in float32, and nearer to float64 in bfloat16."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from model.norm import rms_norm
from model.rope import RotaryTable, apply_rotary
from tests.harness.compare import hold, relative_error
from tests.model.kernels.conftest import NARROW, requires_interpreter

requires_interpreter()

from model.kernels.rotary import fused_norm_rotary
from tests.model.kernels.test_norm import EPS, drawn, values_and_gradients

SHAPES = [(1, 1, 4, 2), (7, 3, 24, 5), (300, 2, 16, 8), (5, 4, 256, 128), (3, 4, 512, 64)]
"""T, N, H, R: all pairs are rotated or some; heads of no power of 2, and in number none; several programs."""


def table(num_tokens: int, rotated: int) -> tuple[Tensor, Tensor]:
    angles_TR = 10 * drawn(num_tokens, rotated)
    return angles_TR.cos(), angles_TR.sin()


def plain(x_TNH: Tensor, weight_H: Tensor | None = None, *, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary(rms_norm(x_TNH, weight_H, EPS), RotaryTable(cos.to(x_TNH.dtype), sin.to(x_TNH.dtype)))


def fused(x_TNH: Tensor, weight_H: Tensor | None = None, *, cos: Tensor, sin: Tensor) -> Tensor:
    return fused_norm_rotary(x_TNH, weight_H, cos.to(x_TNH.dtype), sin.to(x_TNH.dtype), EPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_norm_rotary(shape: tuple[int, ...], has_weight: bool) -> None:
    *heads, rotated = shape
    cos, sin = table(heads[0], rotated)
    inputs, grad = [drawn(*heads)] + ([1 + drawn(heads[-1])] if has_weight else []), drawn(*heads).flip(-1)
    exact = values_and_gradients(partial(plain, cos=cos, sin=sin), inputs, grad)
    found = values_and_gradients(partial(fused, cos=cos, sin=sin), [x.float() for x in inputs], grad)
    for name, a, true in zip(("out", "x", "weight"), found, exact, strict=False):
        hold(f"kernels, norm and rotary in float32: {name}", relative_error(a, true), 1e-6)
    for dtype, cut in NARROW.items():
        rounded = [x.to(dtype) for x in inputs]
        angles = {"cos": cos.to(dtype).double(), "sin": sin.to(dtype).double()}
        exact = values_and_gradients(partial(plain, **angles), [x.double() for x in rounded], grad.to(dtype))
        for wide_weight in (False, True):
            given = [rounded[0], *(w.float() if wide_weight else w for w in rounded[1:])]
            found, expected = (values_and_gradients(partial(f, **angles), given, grad) for f in (fused, plain))
            for name, a, b, true in zip(("out", "x", "weight"), found, expected, exact, strict=False):
                assert a.dtype == b.dtype and a.shape == b.shape
                bound = 1.05 * relative_error(b, true) + cut
                hold(f"kernels, norm and rotary in {dtype} beside plain: {name}", relative_error(a, true), bound)


@pytest.mark.parametrize("apart", ["tokens", "heads", "numbers"])
def test_heads_may_lie_apart(apart: str) -> None:
    """Queries as a part of a packed product, heads before tokens, and heads that have to be made contiguous."""
    wide, grad = drawn(9, 5, 32).float().requires_grad_(), drawn(3, 9, 16).float().transpose(0, 1)
    weight, (cos, sin) = 1 + drawn(16).float(), table(9, 6)
    x_TNH = {
        "tokens": wide[:, 1:4, 8:24],
        "heads": wide.transpose(0, 1).contiguous().transpose(0, 1)[:, :3, :16],
        "numbers": wide[:, :3, ::2],
    }[apart]
    out, expected = (f(x_TNH, weight, cos=cos, sin=sin) for f in (fused, plain))
    (of_wide,), (of_expected,) = (torch.autograd.grad(o, wide, grad, retain_graph=True) for o in (out, expected))
    assert out.is_contiguous()
    hold("kernels, norm and rotary of heads that lie apart", relative_error(out, expected), 1e-6)
    hold("kernels, norm and rotary of heads that lie apart", relative_error(of_wide, of_expected), 1e-6)


def test_no_rows() -> None:
    x, weight = torch.empty(0, 2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = fused_norm_rotary(x, weight, torch.empty(0, 4), torch.empty(0, 4), EPS)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), out.detach())
    assert out.shape == of_x.shape == x.shape and torch.equal(of_weight, torch.zeros(8))


def test_the_same_gradients_again() -> None:
    cos, sin = table(300, 12)
    inputs, grad = [drawn(300, 2, 24).float(), 1 + drawn(24).float()], drawn(300, 2, 24)
    first, second = (values_and_gradients(partial(fused, cos=cos, sin=sin), inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
