"""Rows to experts and back in one pass: the plain path's in float32, and nearer to float64 in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.moe import run_routed
from tests.harness.compare import hold, relative_error
from tests.model.kernels.conftest import NARROW, requires_interpreter

requires_interpreter()

from model.kernels.experts import permute, weighted_combine
from tests.model.kernels.test_norm import drawn, values_and_gradients

SHAPES = [(1, 8, 1, 3), (9, 24, 2, 4), (20, 100, 3, 8), (3, 2816, 8, 16)]
"""T, D, top_k, E: widths of no power of 2, one expert a token and several."""


def routed(num_tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Which experts [T, top_k] each token has, and its slots in their order."""
    indices_Tk = drawn(num_tokens, num_experts).topk(top_k).indices
    order = indices_Tk.flatten().argsort(stable=True)
    return indices_Tk, order.argsort()


def plain_permute(x_TD: Tensor, slot: Tensor, top_k: int) -> Tensor:
    return x_TD[slot.argsort() // top_k]


def plain_combine(y: Tensor, weights_Tk: Tensor, slot: Tensor) -> Tensor:
    """The end of `run_routed`."""
    y_TkD = y[slot].view(*weights_Tk.shape, y.shape[1])
    return (y_TkD * weights_Tk[..., None]).sum(dim=1).to(y.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_permute(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    num_tokens, width, top_k, num_experts = shape
    _, slot = routed(num_tokens, top_k, num_experts)
    x = drawn(num_tokens, width).to(dtype).requires_grad_()
    out, grad = permute(x, slot, top_k), drawn(num_tokens * top_k, width).to(dtype)
    assert torch.equal(out, plain_permute(x, slot, top_k))
    (of_x,) = torch.autograd.grad(out, x, grad)
    sums = grad.double()[slot].view(num_tokens, top_k, width).sum(dim=1)
    expected = sums.to(dtype)
    assert of_x.dtype == dtype and of_x.shape == x.shape
    bound = 1e-6 + (1.05 * relative_error(expected, sums) + NARROW[dtype] if dtype in NARROW else 0)
    hold(f"kernels, permute in {dtype}: x", relative_error(of_x, sums), bound)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_combine(shape: tuple[int, ...]) -> None:
    num_tokens, width, top_k, num_experts = shape
    _, slot = routed(num_tokens, top_k, num_experts)
    y, weights, grad = drawn(num_tokens * top_k, width), drawn(num_tokens, top_k), drawn(num_tokens, width)

    def found(combine: Callable[..., Tensor], y: Tensor, weights_Tk: Tensor, grad: Tensor) -> list[Tensor]:
        return values_and_gradients(lambda y, weights_Tk: combine(y, weights_Tk, slot), [y, weights_Tk], grad)

    for dtype, cut in {torch.float32: 0.0, **NARROW}.items():
        given = y.to(dtype), weights.float(), grad.to(dtype)
        exact = found(plain_combine, *(tensor.double() for tensor in given))
        fused, plain = (found(combine, *given) for combine in (weighted_combine, plain_combine))
        for name, a, b, true in zip(("out", "y", "weights"), fused, plain, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            bound = 1e-6 if a.dtype == torch.float32 else 1.05 * relative_error(b, true) + cut
            hold(f"kernels, combine in {dtype}: {name}", relative_error(a, true), bound)


def test_both_around_experts_are_what_the_plain_path_makes() -> None:
    """One expert's product after the other, between the two kernels."""
    num_tokens, width, top_k, num_experts = 12, 16, 2, 4
    indices, slot = routed(num_tokens, top_k, num_experts)
    inputs = [drawn(num_tokens, width), drawn(num_tokens, top_k), drawn(num_experts, 24, width), drawn(4, width, 12)]
    x, weights, gate_up, down = (tensor.float().requires_grad_() for tensor in inputs)

    rows = permute(x, slot, top_k)
    expert = indices.flatten()[slot.argsort()]
    gate, up = torch.einsum("rd,rfd->rf", rows, gate_up[expert]).chunk(2, dim=-1)
    hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
    out = weighted_combine(torch.einsum("rf,rdf->rd", hidden, down[expert]), weights, slot)

    expected, leaves = run_routed(x, weights, indices, gate_up, down), (x, weights, gate_up, down)
    grad = drawn(num_tokens, width).float()
    gradients = zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, expected)), strict=True)
    for a, b in [(out, expected), *gradients]:
        hold("kernels, permute and combine around experts", relative_error(a, b), 2e-6)


def test_rows_may_lie_apart() -> None:
    _, slot = routed(6, 2, 4)
    wide, weights, grad = drawn(12, 40).float(), drawn(2, 6).float().T, drawn(6, 32).float()[:, ::2]
    assert torch.equal(permute(wide[:6, 8:24], slot, 2), plain_permute(wide[:6, 8:24], slot, 2))
    leaves = wide.requires_grad_(), weights.requires_grad_()
    out, expected = (f(wide[:, 8:24], weights, slot) for f in (weighted_combine, plain_combine))
    gradients = zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, expected)), strict=True)
    for a, b in [(out, expected), *gradients]:
        hold("kernels, combine of rows that lie apart", relative_error(a, b), 1e-6)


def test_no_rows() -> None:
    slot = torch.empty(0, dtype=torch.int64)
    x, weights = torch.empty(0, 8, requires_grad=True), torch.empty(0, 2, requires_grad=True)
    rows = permute(x, slot, 2)
    out = weighted_combine(rows, weights, slot)
    of_x, of_weights = torch.autograd.grad(out, (x, weights), out.detach())
    assert rows.shape == out.shape == of_x.shape == x.shape and of_weights.shape == weights.shape
