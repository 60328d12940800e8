"""Norms in one pass: values and gradients of the plain norm in float32, and nearer to float64 in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.norm import rms_norm
from tests.harness.compare import hold, relative_error
from tests.model.kernels.conftest import NARROW, requires_interpreter

requires_interpreter()

from model.kernels.norm import fused_add_rms_norm, fused_rms_norm

EPS = 1e-6
Norm = Callable[..., Tensor]


def plain_add(x: Tensor, branch: Tensor, weight_D: Tensor, scale: Tensor | None) -> Tensor:
    """The end of a branch as the decoder has it."""
    out = x + rms_norm(branch, weight_D, EPS)
    return out if scale is None else out * scale.to(out.dtype)


def values_and_gradients(norm: Norm, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = norm(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


SHAPES = [(1, 5), (7, 24), (300, 24), (3, 2, 100), (5, 4100)]
"""Widths that are no power of 2; one row, rows of several tiles and programs, heads, rows of a tile each."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_norm(shape: tuple[int, ...], has_weight: bool) -> None:
    inputs = [drawn(*shape)] + ([1 + drawn(shape[-1])] if has_weight else [])
    compare("norm", lambda x, w=None: fused_rms_norm(x, w, EPS), lambda x, w=None: rms_norm(x, w, EPS), inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.75])
def test_add_norm(shape: tuple[int, ...], scale: float | None) -> None:
    factor = None if scale is None else torch.tensor([scale])
    inputs = [drawn(*shape), drawn(*shape).flip(0), 1 + drawn(shape[-1])]
    compare(
        "add norm",
        lambda x, branch, w: fused_add_rms_norm(x, branch, w, EPS, factor),
        lambda x, branch, w: plain_add(x, branch, w, factor),
        inputs,
    )


def compare(kind: str, fused: Norm, plain: Norm, inputs: list[Tensor]) -> None:
    grad = drawn(*inputs[0].shape).flip(-1)
    exact = values_and_gradients(plain, inputs, grad)
    found, expected = (values_and_gradients(f, [x.float() for x in inputs], grad) for f in (fused, plain))
    for name, a, b, true in zip(("out", "grad", "grad", "grad"), found, expected, exact, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape
        hold(f"kernels, {kind} in float32: {name}", relative_error(a, true), 1e-6)
    for dtype, cut in NARROW.items():
        rounded = [x.to(dtype) for x in inputs]
        exact = values_and_gradients(plain, [x.double() for x in rounded], grad.to(dtype))
        for wide_weight in (False, True):
            # The weight, if there is one, is last.
            given = [*rounded[:-1], rounded[-1].float() if wide_weight and rounded[-1].dim() == 1 else rounded[-1]]
            found, expected = (values_and_gradients(f, given, grad) for f in (fused, plain))
            for name, a, b, true in zip(("out", "grad", "grad", "grad"), found, expected, exact, strict=False):
                assert a.dtype == b.dtype and a.shape == b.shape
                bound = 1.05 * relative_error(b, true) + cut
                hold(f"kernels, {kind} in {dtype} beside plain: {name}", relative_error(a, true), bound)


def test_rows_may_lie_apart() -> None:
    wide, weight, grad = drawn(9, 64).float().requires_grad_(), 1 + drawn(16).float(), drawn(9, 32).float()
    out = fused_rms_norm(wide[:, 8:24], weight, EPS)
    (of_wide,) = torch.autograd.grad(out, wide, grad[:, ::2])
    expected = rms_norm(wide[:, 8:24], weight, EPS)
    (of_expected,) = torch.autograd.grad(expected, wide, grad[:, ::2])
    hold("kernels, norm of rows that lie apart", relative_error(out, expected), 1e-6)
    hold("kernels, norm of rows that lie apart", relative_error(of_wide, of_expected), 1e-6)


def test_no_rows() -> None:
    weight, scale = torch.ones(8, requires_grad=True), torch.ones(1)
    x, branch = torch.empty(0, 2, 8, requires_grad=True), torch.empty(0, 2, 8, requires_grad=True)
    for out in (fused_rms_norm(x, weight, EPS), fused_add_rms_norm(x, branch, weight, EPS, scale)):
        assert out.shape == x.shape
        of_x, of_weight = torch.autograd.grad(out, (x, weight), out.detach())
        assert of_x.shape == x.shape and torch.equal(of_weight, torch.zeros(8))


def test_the_same_gradients_again() -> None:
    inputs, grad = [drawn(300, 24).float(), 1 + drawn(24).float()], drawn(300, 24)
    first, second = (values_and_gradients(lambda x, w: fused_rms_norm(x, w, EPS), inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
