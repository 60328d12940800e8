"""Both passes of the loss over scores: sums, labels' scores and gradients of the plain path."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model.head import LossGradients, ScoreTiles, Tiles
from tests.harness.compare import hold, relative_error
from tests.model.kernels.conftest import NARROW, requires_interpreter

requires_interpreter()

from model.kernels.cross_entropy import cap_and_sum, cap_gradient
from tests.model.kernels.test_norm import drawn

SOFTCAP = 30.0
SHAPES = [(1, 1), (7, 50), (3, 4096), (4, 9000)]
"""T and B: one score, blocks of less than a piece of a row, of one, of several that do not divide it."""


class Kept(LossGradients):
    """The gradients of scores themselves, where the loss takes them through the head's product."""

    def __init__(self) -> None:
        self.grad = torch.empty(0)

    def add(self, rows: slice, block: slice, hidden: Tensor, grad: Tensor) -> None:
        self.grad = grad.clone()


class Passes(NamedTuple):
    """What both passes give."""

    sums: Tensor
    labelled: Tensor
    capped: Tensor
    grad: Tensor


class Given(NamedTuple):
    """Scores, divided by the soft cap, of a block that starts somewhere; and two factors of their gradient."""

    scores_TB: Tensor
    labels_T: Tensor
    start: int
    of_all_T: Tensor
    of_label_T: Tensor


def drawn_scores(num_tokens: int, width: int, start: int = 0) -> Given:
    """Scores small and large; labels at both ends of the block, inside, before and after it."""
    sizes = 2.0 ** (torch.arange(num_tokens * width) % 9 - 6).view(num_tokens, width)
    places = torch.tensor([0, -1, width, width - 1, width // 2, -start, width + 5])[torch.arange(num_tokens) % 7]
    scores, (of_all, of_label) = drawn(num_tokens, width) * sizes, drawn(2, num_tokens)
    of_all = of_all / scores.tanh().mul(SOFTCAP).exp().sum(dim=1)
    return Given(scores.float(), start + places, start, of_all.float(), of_label.float())


def plain(given: Given, dtype: torch.dtype) -> Passes:
    """The plain path, whose hidden states are one, and the head is the scores."""
    rows, (num_tokens, width) = slice(0, len(given.scores_TB)), given.scores_TB.shape
    raw, labels, kept = (given.scores_TB.double() * SOFTCAP).to(dtype), given.labels_T - given.start, Kept()
    tiles = ScoreTiles(torch.eye(num_tokens, dtype=dtype), raw.T, labels, SOFTCAP, Tiles(num_tokens, width))
    sums, labelled = tiles.make(rows)
    tiles.add_gradients(rows, given.of_all_T.to(dtype), given.of_label_T.to(dtype), kept)
    return Passes(sums, labelled, (raw / SOFTCAP).tanh(), kept.grad)


def fused(given: Given, dtype: torch.dtype) -> Passes:
    scores = given.scores_TB.clone()
    sums, labelled = cap_and_sum(scores, given.labels_T, given.start, SOFTCAP)
    out = torch.empty_like(scores, dtype=dtype)
    cap_gradient(scores, given.labels_T, given.start, SOFTCAP, given.of_all_T, given.of_label_T, out)
    return Passes(sums, labelled, scores, out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", [0, 100])
def test_both_passes(shape: tuple[int, int], start: int) -> None:
    given = drawn_scores(*shape, start)
    exact, beside, found = plain(given, torch.float64), plain(given, torch.float32), fused(given, torch.float32)
    for name, a, b, true in zip(Passes._fields, found, beside, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        # Where tanh is nearly 1, its last digit is what the gradient is made of.
        bound = 1.05 * relative_error(b, true) + 1e-6
        hold(f"kernels, loss in float32 beside plain: {name}", relative_error(a, true), bound)
    small = given.scores_TB.abs() < 1
    worst = ((found.capped - exact.capped) / exact.capped)[small].abs().max().item() if small.any() else 0.0
    hold("kernels, loss in float32: each tanh", worst, 4e-7)
    for dtype, cut in NARROW.items():
        grad = fused(given, dtype).grad
        # Few large numbers are most of the norm, so that each counts, which is cut twice as far as many are on average.
        bound = 1.05 * relative_error(beside.grad.to(dtype), exact.grad) + 2 * cut
        assert grad.dtype == dtype
        hold(f"kernels, loss in {dtype}: grad", relative_error(grad, exact.grad), bound)


def test_blocks_make_what_the_whole_makes() -> None:
    """Each label is in one block; sums and labels' scores add up."""
    given = drawn_scores(7, 90)
    whole = fused(given, torch.float32)
    blocks = [
        fused(given._replace(scores_TB=given.scores_TB[:, start : start + 40], start=start), torch.float32)
        for start in (0, 40, 80)
    ]
    assert torch.equal(torch.cat([block.grad for block in blocks], dim=1), whole.grad)
    sums, labelled = (torch.stack([block[i] for block in blocks]).sum(dim=0) for i in range(2))
    assert torch.equal(labelled, whole.labelled) and (labelled != 0).any() and (labelled == 0).any()
    hold("kernels, loss by blocks", relative_error(sums, whole.sums), 1e-6)


def test_scores_may_lie_apart_and_become_their_gradient() -> None:
    given = drawn_scores(5, 4100)
    expected = fused(given, torch.float32)
    wide = torch.full((5, 4200), 7.0)
    scores = wide[:, 16:4116].copy_(given.scores_TB)
    cap_and_sum(scores, given.labels_T, 0, SOFTCAP)
    cap_gradient(scores, given.labels_T, 0, SOFTCAP, given.of_all_T, given.of_label_T, scores)
    assert torch.equal(scores, expected.grad)
    assert (wide[:, :16] == 7).all() and (wide[:, 4116:] == 7).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_no_rows_and_no_block(shape: tuple[int, int]) -> None:
    empty, labels, zeros = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64), torch.zeros(shape[0])
    sums, labelled = cap_and_sum(empty, labels, 0, SOFTCAP)
    cap_gradient(empty, labels, 0, SOFTCAP, sums, labelled, empty)
    assert torch.equal(sums, zeros) and torch.equal(labelled, zeros)
