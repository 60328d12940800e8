"""The output head: soft cap, and the fused linear cross entropy that never holds the batch's logits.

Scores of a few tokens at a time are made, a block of the vocabulary after the other, each while the one before is
still in the cache: first the sums of their exponentials, then, from the same scores, the gradients of hidden states
and head. (Cut cross entropy makes the scores twice and drops small gradients; this one is exact.) The formulas are in
docs/gemma4.md 7.1 and 7.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ConfigError
from model.precision import accumulation_dtype, add_product_, product_
from model.triton_choice import by_triton

LARGEST_SOFTCAP = 70.0
"""Scores are at most this, so that exponentials and their sums are numbers in float32 without taking a maximum out."""


class CrossEntropy(NamedTuple):
    """Sums over tokens, float32. `total` is differentiable and includes the z-loss."""

    total: Tensor
    nll: Tensor
    z: Tensor
    nll_T: Tensor
    """That of each token, without a gradient."""


class Tiles(NamedTuple):
    """How much of the scores [T, V] is held: those of `tokens`, made `pieces` of the vocabulary at a time."""

    tokens: int
    pieces: int

    @classmethod
    def default(cls, device: torch.device, vocabulary: int) -> Tiles:
        """On a CPU blocks in the cache, of at least 128 tokens: for fewer, reading the table would take longest."""
        if device.type != "cpu":
            return cls(max(64, (1 << 26) // vocabulary), vocabulary)
        tokens = max(128, (1 << 23) // vocabulary)
        return cls(tokens, max(1, (1 << 21) // tokens))


class Head(nn.Module):
    """Scores and loss through the token table [V, D], which is the head; a plan that splits it replaces this module."""

    def __init__(self, softcap: float) -> None:
        super().__init__()
        if softcap > LARGEST_SOFTCAP:
            raise ConfigError(
                f"model.final_logit_softcapping={softcap} is too large; largest legal: {LARGEST_SOFTCAP}."
            )
        self.softcap = softcap

    def logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        """Soft-capped scores [..., V] (docs/gemma4.md 7.1)."""
        return softcapped_logits(F.linear(hidden, weight_VD), self.softcap)

    def forward(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float = 0.0) -> CrossEntropy:
        """The fused loss: see `linear_cross_entropy`."""
        return linear_cross_entropy(hidden_TD, weight_VD, labels_T, softcap=self.softcap, z_loss=z_loss)

    def log_probs(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, tiles: Tiles | None = None) -> Tensor:
        """Log-probability [T] of each label, differentiable, for objectives that weigh tokens afterwards.

        In the accumulation dtype. Scores are made tile by tile, and again in the backward, so no tensor is [T, V].
        """
        return _LogProbs.apply(hidden_TD, weight_VD, labels_T, self.softcap, tiles)


def softcapped_logits(logits: Tensor, cap: float) -> Tensor:
    """Scores bounded to (-cap, cap), by a scaled tanh."""
    return torch.tanh(logits / cap) * cap


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    softcap: float,
    z_loss: float = 0.0,
    tiles: Tiles | None = None,
) -> CrossEntropy:
    """Sum of -log softmax(softcap(h W^T))[label], plus `z_loss` times the squared log-sum-exp (docs/gemma4.md 7.2).

    labels_T: [T] int64, all in [0, V); select supervised rows first. tiles: by default `Tiles.default`.
    """
    return CrossEntropy(*_LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, softcap, z_loss, tiles))


class ScoreTiles:
    """Scores of chunks of tokens, one chunk after the other in one buffer; and the gradients that they give.

    labels_T count from the first row of `weight_VD`, which may be a part of the table: a label outside of it gives
    nothing here.
    """

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, softcap: float, tiles: Tiles | None
    ) -> None:
        self.hidden_TD, self.weight_VD, self.labels_T, self.softcap = hidden_TD, weight_VD, labels_T, softcap
        vocabulary = weight_VD.shape[0]
        tokens, pieces = tiles or Tiles.default(hidden_TD.device, max(1, vocabulary))
        self.tokens = min(tokens, hidden_TD.shape[0])
        self.blocks = [slice(v, min(v + pieces, vocabulary)) for v in range(0, vocabulary, pieces)]
        self.dtype = accumulation_dtype(hidden_TD.dtype)
        self._capped = hidden_TD.new_empty(self.tokens * vocabulary, dtype=self.dtype)
        self._scratch = hidden_TD.new_empty(self.tokens * min(pieces, vocabulary), dtype=self.dtype)

    def __iter__(self) -> Iterator[slice]:
        """Rows of one chunk after the other."""
        total = self.hidden_TD.shape[0]
        return (slice(start, min(start + self.tokens, total)) for start in range(0, total, self.tokens or 1))

    def make(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Make the scores of a chunk; the sum of their exponentials and the label's score, for each token."""
        hidden, labels = self.hidden_TD[rows], self.labels_T[rows]
        sums, labelled = hidden.new_zeros((2, len(hidden)), dtype=self.dtype)
        for block, capped, scratch in self._blocks(len(hidden)):
            product_(capped, hidden, self.weight_VD[block].T, 1 / self.softcap)
            found = self._cap(capped, scratch, labels, block)
            sums += found[0]
            labelled += found[1]
        return sums, labelled

    def add_gradients(self, rows: slice, of_all: Tensor, of_label: Tensor, gradients: LossGradients) -> None:
        """Add what the chunk made last gives: gradients of scores are exp(score) * of_all, at the label + of_label."""
        hidden, labels = self.hidden_TD[rows], self.labels_T[rows]
        for block, capped, scratch in self._blocks(len(hidden)):
            if by_triton(capped):
                from model.kernels.cross_entropy import cap_gradient

                grad = scratch.view(-1).view(self.weight_VD.dtype)[: capped.numel()].view(capped.shape)
                cap_gradient(capped, labels, block.start, self.softcap, of_all, of_label, grad)
            else:
                grad = torch.mul(capped, self.softcap, out=scratch).exp_().mul_(of_all[:, None])
                here, place = _here(labels, block)
                grad.scatter_add_(1, place, (of_label * here)[:, None])
                torch.ops.aten.tanh_backward.grad_input(grad, capped, grad_input=grad)
            gradients.add(rows, block, hidden, grad)

    def _cap(self, capped: Tensor, scratch: Tensor, labels: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """Sums of exponentials, and scores of labels in the block; in place the scores become their tanh."""
        if by_triton(capped):
            from model.kernels.cross_entropy import cap_and_sum

            return cap_and_sum(capped, labels, block.start, self.softcap)
        capped.tanh_()
        here, place = _here(labels, block)
        labelled = capped.gather(1, place)[:, 0].mul_(here).mul_(self.softcap)
        return torch.mul(capped, self.softcap, out=scratch).exp_().sum(dim=1), labelled

    def _blocks(self, tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each block with its part of the buffer, which is contiguous, and as much to work in."""
        for block in self.blocks:
            shape, size = (tokens, block.stop - block.start), tokens * (block.stop - block.start)
            start = tokens * block.start
            yield block, self._capped[start : start + size].view(shape), self._scratch[:size].view(shape)


def _here(labels_T: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Whether each label is in a block, and a place [T, 1] there, real or not.

    No number of tokens is asked for, which would make the host wait for a GPU.
    """
    here_T = (labels_T >= block.start) & (labels_T < block.stop)
    return here_T, (labels_T - block.start).clamp(0, block.stop - block.start - 1)[:, None]


class LossGradients:
    """Gradients of hidden states and head, which a loss makes tile by tile, in its forward or its backward."""

    def __init__(self, ctx: Any, hidden_TD: Tensor, weight_VD: Tensor) -> None:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        self.weight_VD = weight_VD
        dtype = accumulation_dtype(weight_VD.dtype)
        self.of_hidden = torch.zeros_like(hidden_TD, dtype=dtype) if wants_hidden else None
        self.of_weight = torch.empty_like(weight_VD, dtype=dtype) if wants_weight else None
        if self.of_weight is not None and not len(hidden_TD):
            self.of_weight.zero_()
        self.wanted = wants_hidden or wants_weight

    def add(self, rows: slice, block: slice, hidden: Tensor, grad: Tensor) -> None:
        """Add what the gradient of a tile's scores gives, before the soft cap."""
        grad = grad.to(self.weight_VD.dtype)
        if self.of_hidden is not None:
            add_product_(self.of_hidden[rows], grad, self.weight_VD[block])
        if self.of_weight is not None and rows.start == 0:
            product_(self.of_weight[block], grad.T, hidden)
        elif self.of_weight is not None:
            add_product_(self.of_weight[block], grad.T, hidden)

    def save(self, ctx: Any) -> None:
        """Keep the gradients for the backward, which only scales them."""
        ctx.weight_dtype = self.weight_VD.dtype
        ctx.save_for_backward(self.of_hidden, self.of_weight)

    @staticmethod
    def scaled(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The saved gradients, times the gradient of the loss."""
        of_hidden, of_weight = ctx.saved_tensors
        # In place, since a copy would be as large as the head; autograd itself refuses a second backward.
        for saved in (of_hidden, of_weight):
            if saved is not None:
                saved.mul_(grad_total)
        return _narrowed(of_hidden, ctx.weight_dtype), _narrowed(of_weight, ctx.weight_dtype)

    def cast(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients in the dtype of what they are of."""
        return _narrowed(self.of_hidden, self.weight_VD.dtype), _narrowed(self.of_weight, self.weight_VD.dtype)


def _narrowed(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        softcap: float,
        z_loss: float,
        tiles: Tiles | None,
    ) -> tuple[Tensor, ...]:
        return cross_entropy(ctx, ScoreTiles(hidden_TD, weight_VD, labels_T, softcap, tiles), z_loss)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *LossGradients.scaled(ctx, grad_total), None, None, None, None


def cross_entropy(
    ctx: Any, scores: ScoreTiles, z_loss: float, over_parts: Callable[[Tensor], Tensor] = lambda sums: sums
) -> tuple[Tensor, ...]:
    """The forward of the fused loss, in which its gradients are made and saved.

    over_parts: sums a tensor over the parts of a table that is split.
    """
    gradients = LossGradients(ctx, scores.hidden_TD, scores.weight_VD)
    nll = scores.hidden_TD.new_zeros((), dtype=scores.dtype)
    z, nll_T = nll.clone(), nll.new_empty(len(scores.hidden_TD))
    for rows in scores:
        sums, labelled = over_parts(torch.stack(scores.make(rows)))
        log_z = sums.log()
        nll_T[rows] = log_z - labelled
        nll += nll_T[rows].sum()
        z += log_z.square().sum()
        if gradients.wanted:
            scores.add_gradients(rows, (1 + 2 * z_loss * log_z) / sums, torch.full_like(sums, -1.0), gradients)
    gradients.save(ctx)
    ctx.mark_non_differentiable(nll, z, nll_T)
    return nll + z_loss * z, nll, z, nll_T


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, softcap: float, tiles: Tiles | None
    ) -> Tensor:
        ctx.softcap, ctx.tiles = softcap, tiles
        sums_T, labelled_T = sums_and_labelled(ScoreTiles(hidden_TD, weight_VD, labels_T, softcap, tiles))
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T, sums_T)
        return labelled_T - sums_T.log()

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        return *log_probs_gradients(ctx, grad_T), None, None, None


def sums_and_labelled(scores: ScoreTiles) -> Tensor:
    """Sums of exponentials and the labels' scores [2, T]."""
    found_2T = scores.hidden_TD.new_empty((2, len(scores.hidden_TD)), dtype=scores.dtype)
    for rows in scores:
        found_2T[0, rows], found_2T[1, rows] = scores.make(rows)
    return found_2T


def log_probs_gradients(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and head, by scores that are made again and the sums that were kept."""
    hidden_TD, weight_VD, labels_T, sums_T = ctx.saved_tensors
    scores = ScoreTiles(hidden_TD, weight_VD, labels_T, ctx.softcap, ctx.tiles)
    gradients = LossGradients(ctx, hidden_TD, weight_VD)
    for rows in scores:
        scores.make(rows)
        scores.add_gradients(rows, -grad_T[rows] / sums_T[rows], grad_T[rows], gradients)
    return gradients.cast()
