"""Every raw collective of ours, as an autograd function with its backward beside it.

Gradients here are those of the sum over ranks of what each computes. A tensor that several
ranks hold alike gets a part of its gradient on each, and the parts add up to all of it; a
parameter's parts are added when FSDP reduces.

Letters of this file: R ranks, or in `table_RC` the rows of a table that a rank holds; C columns; U unique ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.precision import upcast


class _Collective(torch.autograd.Function):
    """A linear collective `there`, whose backward is the collective `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on each of them. Its backward is the same: what each rank's copy got is summed."""
    total = partial(all_reduced, group=group)
    return _Collective.apply(x, total, total)


def gather_tokens(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows end to end; in the backward each gets the sum of what its rows met."""
    return _Collective.apply(x_TD, partial(_gathered, group=group), partial(_scattered, group=group))


def scatter_tokens(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, of which each keeps its run of rows; the backward gathers. Rows must divide by ranks."""
    return _Collective.apply(x_TD, partial(_scattered, group=group), partial(_gathered, group=group))


def exchange_rows(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """`sends[r]` rows of x to each rank r in turn, and `receives[r]` rows from each, end to end; backward: back."""
    there = partial(_all_to_all, sends=sends, receives=receives, group=group)
    return _Collective.apply(x, there, partial(_all_to_all, sends=receives, receives=sends, group=group))


def exchange_counts(sends_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """How many each rank has for this one, for how many this one has for each."""
    receives_R = torch.empty_like(sends_R)
    dist.all_to_all_single(receives_R, sends_R, group=group)
    return receives_R


def send_recv(x: Tensor, other: int, group: dist.ProcessGroup) -> Tensor:
    """What rank `other` of the group gives for x; it must call this too."""
    peer, x = dist.get_global_rank(group, other), x.contiguous()
    received = torch.empty_like(x)
    operations = [dist.P2POp(dist.isend, x, peer, group), dist.P2POp(dist.irecv, received, peer, group)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received


def ring_send_recv(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> RingTransfer:
    """Start sending tensors to the next rank of a ring and receiving as many of the same shapes from the one before."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    sent = tuple(t.contiguous() for t in tensors)
    received = tuple(torch.empty_like(t) for t in sent)
    operations = [
        *(dist.P2POp(dist.isend, t, after, group) for t in sent),
        *(dist.P2POp(dist.irecv, t, before, group) for t in received),
    ]
    return RingTransfer(received, sent, dist.batch_isend_irecv(operations))


class RingTransfer(NamedTuple):
    """Tensors under way around a ring; `sent` stays alive until they have arrived."""

    received: tuple[Tensor, ...]
    sent: tuple[Tensor, ...]
    requests: list[Any]

    def wait(self) -> tuple[Tensor, ...]:
        for request in self.requests:
            request.wait()
        return self.received


def all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, without a backward."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _gathered(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x_TD.new_empty(group.size() * x_TD.shape[0], *x_TD.shape[1:])
    dist.all_gather_single(out, x_TD.contiguous(), group=group)
    return out


def _scattered(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x_TD.new_empty(x_TD.shape[0] // group.size(), *x_TD.shape[1:])
    dist.reduce_scatter_single(out, x_TD.contiguous(), group=group)
    return out


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
        sends, receives = torch.stack((wanted, exchange_counts(wanted, owners.shards))).tolist()
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
        grad_TC = upcast(grad_TC)
        grad_UC = grad_TC.new_zeros(sum(ctx.sends), grad_TC.shape[1])
        grad_UC.index_add_(0, inverse_T, grad_TC.masked_fill(is_padding_T[:, None], 0.0))
        grads = _all_to_all(grad_UC, ctx.sends, ctx.receives, ctx.owners.shards)
        shape, device = ctx.table
        ids = local.to(grads.device)
        if ctx.owners.replicas is not None:
            ids, grads = _from_all_replicas(ids, grads, ctx.owners.replicas)
        # In the order of ranks, so replicas, which add up the same, stay the same.
        ids, grads = ids.to(device), grads.to(device)
        table_grad = grads.new_zeros(shape).index_add_(0, ids, grads)
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
    dist.all_gather_single(counts, count, group=group)
    most = int(counts.max())
    real = torch.arange(most, device=ids.device)[None, :] < counts[:, None]
    found = []
    for mine in (ids, grads):
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        every = mine.new_empty(group.size() * most, *mine.shape[1:])
        dist.all_gather_single(every, padded, group=group)
        found.append(every[real.flatten()])
    return found[0], found[1]
