"""The gate in one pass: values and gradients of the plain gate in float32, and nearer to float64 in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.compare import hold, relative_error
from tests.model.kernels.conftest import NARROW, requires_interpreter

requires_interpreter()

from model.kernels.gate import fused_gated_gelu
from tests.model.kernels.test_norm import drawn, values_and_gradients

SHAPES = [(1, 5), (7, 64), (40, 100), (3, 2, 704), (2, 2048)]
"""Widths that no part divides, and that several do; one row, rows of several programs."""


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(shape: tuple[int, ...]) -> None:
    inputs, grad = [2 * drawn(*shape), drawn(*shape).flip(0)], drawn(*shape).flip(-1)
    exact = values_and_gradients(plain, inputs, grad)
    found = values_and_gradients(fused_gated_gelu, [x.float() for x in inputs], grad)
    for name, a, true in zip(("out", "gate", "up"), found, exact, strict=True):
        hold(f"kernels, gate in float32: {name}", relative_error(a, true), 1e-6)
    for dtype, cut in NARROW.items():
        rounded = [x.to(dtype) for x in inputs]
        exact = values_and_gradients(plain, [x.double() for x in rounded], grad.to(dtype))
        found, expected = (values_and_gradients(f, rounded, grad) for f in (fused_gated_gelu, plain))
        for name, a, b, true in zip(("out", "gate", "up"), found, expected, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            bound = 1.05 * relative_error(b, true) + cut
            hold(f"kernels, gate in {dtype} beside plain: {name}", relative_error(a, true), bound)


def test_large_numbers() -> None:
    gate, up = torch.tensor([[-1e4, -20.0, -0.0, 20.0, 1e4]]), torch.ones(1, 5)
    found, expected = (values_and_gradients(f, [gate, up], up) for f in (fused_gated_gelu, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_halves_of_a_packed_product_are_read_where_they_are() -> None:
    packed = drawn(9, 1408).float().requires_grad_()
    out = fused_gated_gelu(*packed.chunk(2, dim=-1))
    assert out.is_contiguous()
    grad = drawn(9, 1408).float()[:, ::2]
    expected = plain(*packed.chunk(2, dim=-1))
    (of_packed,), (of_expected,) = (torch.autograd.grad(o, packed, grad) for o in (out, expected))
    hold("kernels, gate of halves", relative_error(out, expected), 1e-6)
    hold("kernels, gate of halves", relative_error(of_packed, of_expected), 1e-6)


def test_rows_may_lie_apart_in_different_ways() -> None:
    wide, up, grad = drawn(9, 300).float().requires_grad_(), drawn(9, 200).float(), drawn(9, 150).float()
    out, expected = (f(wide[:, 16:116], up[:, 8:108]) for f in (fused_gated_gelu, plain))
    of_wide, of_expected = (torch.autograd.grad(o, wide, grad[:, :100])[0] for o in (out, expected))
    hold("kernels, gate of rows that lie apart", relative_error(out, expected), 1e-6)
    hold("kernels, gate of rows that lie apart", relative_error(of_wide, of_expected), 1e-6)


def test_no_rows() -> None:
    gate, up = (torch.empty(0, 2, 8, requires_grad=True) for _ in range(2))
    out = fused_gated_gelu(gate, up)
    assert out.shape == gate.shape
    assert [g.shape for g in torch.autograd.grad(out, (gate, up), out.detach())] == [gate.shape, up.shape]
