"""The tied token table split by vocabulary over `tp`: look-up and loss. No rank holds all of it, nor a [T, V] tensor.

The soft cap bounds every score, so the sum of exponentials needs no maximum taken out first:
what crosses for each token is that sum and the label's score, two float32, in one all-reduce a
chunk. A rank has ceil(V / tp) rows of the table, the last ranks fewer or none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from model.config import ConfigError
from model.head import (
    CrossEntropy,
    Head,
    LossGradients,
    capped_scores_,
    default_chunk_size,
    score_chunks,
    softcapped_logits,
)
from model.precision import accumulation_dtype
from parallel.collectives import all_reduced, gather_tokens
from parallel.dtensors import local_part, sharded_parameter
from parallel.tensor.tokens import TensorParallel

_LARGEST_CAP = 80.0
"""exp of it, times a vocabulary, is still far from the largest float32."""


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
        if softcap > _LARGEST_CAP:
            raise ConfigError(
                f"model.final_logit_softcapping={softcap} is too large for the split loss of parallel.tp={plan.size}; "
                f"largest legal: {_LARGEST_CAP}."
            )
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
        chunk_size: int | None = None,
    ) -> CrossEntropy:
        """The loss of `linear_cross_entropy`, with the whole value on every rank.

        weight_VD: the DTensor split over `tp`. Each rank must go backward with the same factor on
        its `total`: its gradient of `hidden_TD` is then the part that its rows of the table make,
        and that of its rows is complete.
        """
        assert isinstance(weight_VD, DTensor)
        most = _rows_per_rank(weight_VD.shape[0], self.plan)
        if chunk_size is None:  # the same on every rank, as ranks meet once a chunk
            chunk_size = default_chunk_size(hidden_TD.device, most)
        options = (self.plan.rank * most, self.softcap, z_loss, chunk_size, self.plan.group)
        return CrossEntropy(*_VocabParallelCrossEntropy.apply(hidden_TD, local_part(weight_VD), labels_T, *options))

    def log_probs(
        self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int | None = None
    ) -> Tensor:
        """The same values on every rank; each must go backward with the same gradient, as in `forward`."""
        most = _rows_per_rank(weight_VD.shape[0], self.plan)
        if chunk_size is None:
            chunk_size = default_chunk_size(hidden_TD.device, most)
        options = (self.plan.rank * most, self.softcap, chunk_size, self.plan.group)
        return _VocabParallelLogProbs.apply(hidden_TD, local_part(weight_VD), labels_T, *options)


def _rows_per_rank(rows: int, plan: TensorParallel) -> int:
    """Rows of a table on each rank, but for the last ranks, which have fewer or none."""
    return -(-rows // plan.size)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Like the fused loss of `model.head`: gradients are made in the forward, chunk by chunk."""

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes what it saves one by one
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        first_row: int,
        softcap: float,
        z_loss: float,
        chunk_size: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = LossGradients(ctx, hidden_TD, weight_VD)
        dtype = accumulation_dtype(hidden_TD.dtype)
        nll = hidden_TD.new_zeros((), dtype=dtype)
        z = nll.clone()
        # The same buffers serve every chunk.
        buffers = hidden_TD.new_empty((2, min(chunk_size, hidden_TD.shape[0]), weight_VD.shape[0]), dtype=dtype)
        for start in range(0, hidden_TD.shape[0], chunk_size):
            hidden, local = hidden_TD[start : start + chunk_size], labels_T[start : start + chunk_size] - first_row
            capped, exponentials = buffers[:, : hidden.shape[0]].unbind()
            capped_scores_(capped, hidden, weight_VD, softcap)
            torch.mul(capped, softcap, out=exponentials).exp_()
            parts = hidden.new_zeros((2, hidden.shape[0]), dtype=dtype)
            parts[0] = exponentials.sum(dim=1)
            parts[1] = _labelled(capped, local) * softcap
            sums, scores = all_reduced(parts, group)
            log_z = sums.log()
            nll += (log_z - scores).sum()
            z += log_z.square().sum()
            if gradients.wanted:
                grad_fp32 = exponentials.mul_(((1 + 2 * z_loss * log_z) / sums)[:, None])
                _add_at_labels_(grad_fp32, local, grad_fp32.new_full(local.shape, -1.0))
                gradients.add(start, hidden, capped, grad_fp32)
        gradients.save(ctx)
        ctx.mark_non_differentiable(nll, z)
        return nll + z_loss * z, nll, z

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *LossGradients.scaled(ctx, grad_total), None, None, None, None, None, None


class _VocabParallelLogProbs(torch.autograd.Function):
    """The log-probabilities of `model.head`; sums of exponentials are kept, so the backward exchanges nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        first_row: int,
        softcap: float,
        chunk_size: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        parts_2T = hidden_TD.new_zeros((2, hidden_TD.shape[0]), dtype=accumulation_dtype(hidden_TD.dtype))
        for rows, _, scores in score_chunks(hidden_TD, weight_VD, softcap, chunk_size):
            parts_2T[1, rows] = _labelled(scores, labels_T[rows] - first_row)
            parts_2T[0, rows] = scores.exp_().sum(dim=1)
        sums_T, labelled_T = all_reduced(parts_2T, group)
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T, sums_T)
        ctx.first_row, ctx.softcap, ctx.chunk_size = first_row, softcap, chunk_size
        return labelled_T - sums_T.log()

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, labels_T, sums_T = ctx.saved_tensors
        gradients = LossGradients(ctx, hidden_TD, weight_VD)
        for rows, capped, scores in score_chunks(hidden_TD, weight_VD, ctx.softcap, ctx.chunk_size):
            grad_scores = scores.exp_().mul_((-grad_T[rows] / sums_T[rows])[:, None])
            _add_at_labels_(grad_scores, labels_T[rows] - ctx.first_row, grad_T[rows])
            gradients.add(rows.start, hidden_TD[rows], capped, grad_scores)
        of_weight = gradients.of_weight
        of_weight = None if of_weight is None else of_weight.to(weight_VD.dtype)
        return gradients.of_hidden, of_weight, None, None, None, None, None


def _here(local_T: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """Which of the tokens are among the `held` pieces of this rank, and for each a place there, real or not.

    No number of tokens is asked for, which would make the host wait for a GPU.
    """
    return (local_T >= 0) & (local_T < held), local_T.clamp(0, max(held - 1, 0))


def _labelled(scores_TV: Tensor, local_T: Tensor) -> Tensor:
    """The score of each token's label, 0 where another rank has it."""
    if not scores_TV.shape[1]:
        return scores_TV.new_zeros(len(local_T))
    mine_T, place_T = _here(local_T, scores_TV.shape[1])
    return scores_TV.gather(1, place_T[:, None])[:, 0].masked_fill(~mine_T, 0.0)


def _add_at_labels_(scores_TV: Tensor, local_T: Tensor, value_T: Tensor) -> None:
    """Add a value at each token's label, where it is here."""
    if scores_TV.shape[1]:
        mine_T, place_T = _here(local_T, scores_TV.shape[1])
        scores_TV.scatter_add_(1, place_T[:, None], value_T.masked_fill(~mine_T, 0.0)[:, None])
