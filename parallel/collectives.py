"""Every raw collective of ours, as an autograd function with its backward beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class RowOwners(NamedTuple):
    """Who holds which rows of a table: `rows_per_rank` consecutive ones on each rank of `shards`, `first_row` on here.

    `replicas` are the ranks that hold the same rows, or None if there are no others.
    """

    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    rows_per_rank: int
    first_row: int


def fetch_rows(table_RC: Tensor, ids_T: Tensor, owners: RowOwners, padding_row: int, dtype: torch.dtype) -> Tensor:
    """Rows [T, C] of a sharded table, in `dtype`. `table_RC`: the rows this rank holds; their gradients come back.

    What crosses: each rank's unique ids, their rows, and in the backward one float32 gradient
    for each. `padding_row` gets no gradient.
    """
    return _FetchRows.apply(table_RC, ids_T, owners, padding_row, dtype)


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table_RC: Tensor, ids_T: Tensor, owners: RowOwners, padding_row: int, dtype: torch.dtype
    ) -> Tensor:
        unique_U, inverse_T = torch.unique(ids_T, return_inverse=True)  # sorted, so by owner
        wanted = torch.bincount(unique_U // owners.rows_per_rank, minlength=owners.shards.size())
        asked = torch.empty_like(wanted)
        dist.all_to_all_single(asked, wanted, group=owners.shards)
        sends, receives = wanted.tolist(), asked.tolist()
        asked_ids = _all_to_all(unique_U, sends, receives, owners.shards)
        local = (asked_ids - owners.first_row).to(table_RC.device)
        rows_UC = _all_to_all(table_RC[local].to(ids_T.device, dtype), receives, sends, owners.shards)
        ctx.save_for_backward(inverse_T, ids_T == padding_row, local)
        ctx.owners, ctx.sends, ctx.receives = owners, sends, receives
        ctx.table = (table_RC.shape, table_RC.device)
        return rows_UC[inverse_T]

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse_T, is_padding_T, local = ctx.saved_tensors
        grad_UC = torch.zeros(sum(ctx.sends), grad_TC.shape[1], device=grad_TC.device)
        grad_UC.index_add_(0, inverse_T, grad_TC.float().masked_fill(is_padding_T[:, None], 0.0))
        grads = _all_to_all(grad_UC, ctx.sends, ctx.receives, ctx.owners.shards)
        shape, device = ctx.table
        ids = local.to(grads.device)
        if ctx.owners.replicas is not None:
            ids, grads = _from_all_replicas(ids, grads, ctx.owners.replicas)
        # In the order of ranks, so replicas, which add up the same, stay the same.
        table_grad = torch.zeros(shape, device=device).index_add_(0, ids.to(device), grads.to(device))
        return table_grad, None, None, None, None


def _all_to_all(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of x to the ranks in turn, `sends` many to each; what came from each, in turn."""
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out


def _from_all_replicas(ids: Tensor, grads: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Ids and gradients of all replicas, end to end; they come padded to one length."""
    count = torch.tensor([len(ids)], device=ids.device)
    counts = torch.empty(group.size(), dtype=count.dtype, device=ids.device)
    dist.all_gather_into_tensor(counts, count, group=group)
    most = int(counts.max())
    real = torch.arange(most, device=ids.device)[None, :] < counts[:, None]
    found = []
    for mine in (ids, grads):
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        every = mine.new_empty(group.size() * most, *mine.shape[1:])
        dist.all_gather_into_tensor(every, padded, group=group)
        found.append(every[real.flatten()])
    return found[0], found[1]
