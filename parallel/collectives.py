"""Differentiable collectives over tokens, each with its backward beside it.

The loss is the sum over ranks of the local losses. The gradient of a tensor that several ranks hold alike is partial on
each, and the sum over ranks is the true one; for parameters FSDP's reduce makes that sum.

Letter of this file: R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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
    """The tokens of all ranks end to end; in the backward a rank gets the sum of all ranks' gradients of its own."""
    return _Collective.apply(x_TD, partial(_gathered, group=group), partial(_scattered, group=group))


def scatter_tokens(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, of which each keeps its run of rows; the backward gathers. Rows must divide by ranks."""
    return _Collective.apply(x_TD, partial(_scattered, group=group), partial(_gathered, group=group))


def exchange_rows(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """`sends[r]` rows of x to each rank r in turn, and `receives[r]` rows from each, end to end; backward: back."""
    there = partial(all_to_all_rows, sends=sends, receives=receives, group=group)
    return _Collective.apply(x, there, partial(all_to_all_rows, sends=receives, receives=sends, group=group))


def start_exchange(
    tensors: Sequence[Tensor], sends: list[int], receives: list[int], group: dist.ProcessGroup
) -> Callable[[], list[Tensor]]:
    """Rows under way as in `exchange_rows`, of several tensors; what it returns waits for them.

    The backward travels while that of whatever was computed in between runs.
    """
    travels = [_Travel(sends, receives, group) for _ in tensors]
    coming = [_Begin.apply(x, travel) for x, travel in zip(tensors, travels, strict=True)]
    return lambda: [_Finish.apply(x, travel) for x, travel in zip(coming, travels, strict=True)]


class _Travel:
    """One tensor's way to other ranks, and its gradient's way back."""

    def __init__(self, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> None:
        self.sends, self.receives, self.group = sends, receives, group
        self.under_way: tuple[Tensor, Tensor, dist.Work] | None = None

    def begin(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Start; what is returned is filled once `finish` has returned it too."""
        sends, receives = (self.receives, self.sends) if back else (self.sends, self.receives)
        sent, out = x.contiguous(), x.new_empty(sum(receives), *x.shape[1:])
        work = dist.all_to_all_single(out, sent, receives, sends, group=self.group, async_op=True)
        assert work is not None
        self.under_way = sent, out, work  # what is sent lives until it has arrived
        return out

    def finish(self) -> Tensor:
        """What has arrived, once it has."""
        assert self.under_way is not None
        (_, out, work), self.under_way = self.under_way, None
        work.wait()
        return out


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        return travel.begin(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.travel.finish(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        travel.finish()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.travel.begin(grad, back=True)
        return grad, None  # of the right shape, and read by nobody


def exchange_counts(sends_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send a count to each rank; returns the counts that each sends here."""
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
        """The neighbour's tensors, once they have arrived."""
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


def all_to_all_rows(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of x to the ranks in turn, `sends` many to each; what came from each, in turn."""
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out
