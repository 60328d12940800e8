"""The tied token table split by vocabulary over `tp`: look-up and loss. No rank holds all of it, nor a [T, V] tensor.

What crosses for each token is its sum of exponentials and the label's score, two float32, in one all-reduce a chunk.
A rank has ceil(V / tp) rows of the table, the last ranks fewer or none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from model.head import (
    CrossEntropy,
    Head,
    LossGradients,
    ScoreTiles,
    Tiles,
    cross_entropy,
    log_probs_gradients,
    softcapped_logits,
    sums_and_labelled,
)
from parallel.collectives import all_reduced, gather_tokens
from parallel.dtensors import local_part, sharded_parameter
from parallel.tensor.tokens import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """In place of an `nn.Embedding` on `meta`; returns this rank's tokens under sequence parallel, else all."""

    weight: nn.Parameter

    def __init__(self, table: nn.Embedding, plan: TensorParallel) -> None:
        super().__init__()
        assert table.padding_idx is not None
        self.plan, self.padding_idx = plan, table.padding_idx
        self.first_row = plan.rank * _rows_per_rank(table.num_embeddings, plan)
        self.weight = sharded_parameter(table.weight, plan.mesh, (Shard(0),))

    def forward(self, ids_T: Tensor) -> Tensor:
        """Vectors [T, D], or [T / tp, D], in the dtype that the table has."""
        weight = local_part(self.weight)
        mine_T, local_T = _here(ids_T - self.first_row, len(weight))
        if len(weight):
            padding = self.padding_idx - self.first_row
            vectors = F.embedding(local_T, weight, padding if 0 <= padding < len(weight) else None)
        else:  # the vocabulary ends before this rank
            vectors = weight.new_zeros(len(ids_T), weight.shape[1]) + weight.sum()
        return self.plan.reduce_scatter_tokens(vectors.masked_fill(~mine_T[:, None], 0.0))


class VocabParallelHead(Head):
    """Scores and loss of hidden states that all ranks of `tp` hold, through the slice of the table each has."""

    def __init__(self, softcap: float, plan: TensorParallel) -> None:
        super().__init__(softcap)
        self.plan = plan

    def logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        """All scores [..., V], on every rank."""
        part = F.linear(hidden, local_part(weight_VD)).movedim(-1, 0)
        missing = _rows_per_rank(weight_VD.shape[0], self.plan) - part.shape[0]
        padded = F.pad(part.flatten(1), (0, 0, 0, missing))
        whole = gather_tokens(padded, self.plan.group)[: weight_VD.shape[0]].unflatten(1, hidden.shape[:-1])
        return softcapped_logits(whole.movedim(0, -1), self.softcap)

    def forward(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        z_loss: float = 0.0,
        tiles: Tiles | None = None,
    ) -> CrossEntropy:
        """The loss of `linear_cross_entropy`, with the whole value on every rank.

        weight_VD: the DTensor split over `tp`. Each rank must go backward with the same factor on
        its `total`: its gradient of `hidden_TD` is then the part that its rows of the table make,
        and that of its rows is complete.
        """
        assert isinstance(weight_VD, DTensor)
        local_T, tiles = self._part(hidden_TD, weight_VD, labels_T, tiles)
        options = (self.softcap, z_loss, tiles, self.plan.group)
        return CrossEntropy(*_VocabParallelCrossEntropy.apply(hidden_TD, local_part(weight_VD), local_T, *options))

    def log_probs(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, tiles: Tiles | None = None) -> Tensor:
        """The same values on every rank; each must go backward with the same gradient, as in `forward`."""
        local_T, tiles = self._part(hidden_TD, weight_VD, labels_T, tiles)
        options = (self.softcap, tiles, self.plan.group)
        return _VocabParallelLogProbs.apply(hidden_TD, local_part(weight_VD), local_T, *options)

    def _part(
        self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, tiles: Tiles | None
    ) -> tuple[Tensor, Tiles]:
        """Labels that count from this rank's first row; and tiles, the same on all ranks, which meet once a chunk."""
        most = _rows_per_rank(weight_VD.shape[0], self.plan)
        return labels_T - self.plan.rank * most, tiles or Tiles.default(hidden_TD.device, most)


def _rows_per_rank(rows: int, plan: TensorParallel) -> int:
    """Rows of a table on each rank, but for the last ranks, which have fewer or none."""
    return -(-rows // plan.size)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Like the fused loss of `model.head`: gradients are made in the forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        local_T: Tensor,
        softcap: float,
        z_loss: float,
        tiles: Tiles,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:
        scores = ScoreTiles(hidden_TD, weight_VD, local_T, softcap, tiles)
        return cross_entropy(ctx, scores, z_loss, lambda parts: all_reduced(parts, group))

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *LossGradients.scaled(ctx, grad_total), None, None, None, None, None


class _VocabParallelLogProbs(torch.autograd.Function):
    """The log-probabilities of `model.head`; sums of exponentials are kept, so the backward exchanges nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        local_T: Tensor,
        softcap: float,
        tiles: Tiles,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.softcap, ctx.tiles = softcap, tiles
        scores = ScoreTiles(hidden_TD, weight_VD, local_T, softcap, tiles)
        sums_T, labelled_T = all_reduced(sums_and_labelled(scores), group)
        ctx.save_for_backward(hidden_TD, weight_VD, local_T, sums_T)
        return labelled_T - sums_T.log()

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        return *log_probs_gradients(ctx, grad_T), None, None, None, None


def _here(local_T: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """Which of the tokens are among the `held` pieces of this rank, and for each a place there, real or not.

    No number of tokens is asked for, which would make the host wait for a GPU.
    """
    return (local_T >= 0) & (local_T < held), local_T.clamp(0, max(held - 1, 0))
