"""The stream of tokens under tensor parallel: whole on every rank, or each rank's run of it (sequence parallel)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from model.stream import Rows, Stream
from parallel.collectives import all_reduce, exchange_rows, gather_tokens, scatter_tokens


@dataclass
class TensorParallel:
    """The ranks of `tp`, and whether the stream is split among them right now."""

    mesh: DeviceMesh
    sequence_parallel: bool

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    def gathered(self, x_TD: Tensor) -> Tensor:
        """The whole stream, for a product that is split."""
        return gather_tokens(x_TD, self.group) if self.sequence_parallel else x_TD

    def reduced(self, x_TD: Tensor) -> Tensor:
        """The sum of what the ranks' split products made, of which each keeps its tokens."""
        return scatter_tokens(x_TD, self.group) if self.sequence_parallel else all_reduce(x_TD, self.group)

    def share(self, rows: int) -> slice:
        """This rank's run of a stream of `rows`, which may not divide."""
        most = -(-rows // self.size)
        return slice(min(self.rank * most, rows), min((self.rank + 1) * most, rows))


@dataclass(frozen=True)
class MovedRows(Rows):
    """Rows of a stream that is split by tokens, dealt out anew so that each rank gets as many."""

    sends: list[int]
    receives: list[int]
    local: Tensor
    """Which of this rank's own rows are wanted, in order."""
    plan: TensorParallel

    def take(self, x_TD: Tensor) -> Tensor:
        return exchange_rows(x_TD[self.local], self.sends, self.receives, self.plan.group)


class SplitStream(Stream):
    """The stream of which each rank of `tp` holds a run of tokens."""

    def __init__(self, plan: TensorParallel) -> None:
        self.plan = plan

    def rows(self, supervised_BS: Tensor) -> Rows:
        """Padded, with the last row again, to a number that divides."""
        plain = super().rows(supervised_BS)
        if not self.plan.sequence_parallel:
            return plain
        plan, index = self.plan, plain.index
        index = torch.cat((index, index[-1:].expand(-len(index) % plan.size)))
        share = max(len(index) // plan.size, 1)
        held = supervised_BS.numel() // plan.size
        holder, taker = index // held, torch.arange(len(index), device=index.device) // share
        mine = holder == plan.rank
        sends, receives = (
            torch.bincount(ranks, minlength=plan.size).tolist() for ranks in (taker[mine], holder[taker == plan.rank])
        )
        return MovedRows(index, plain.count, sends, receives, index[mine] - plan.rank * held, plan)

    def place(self, x_TD: Tensor, rows: Tensor, features: Tensor) -> Tensor:
        if self.plan.sequence_parallel:
            held = x_TD.shape[0]
            rows = rows - self.plan.rank * held
            rows = torch.where((rows >= 0) & (rows < held), rows, -1)
        return super().place(x_TD, rows, features)


@contextmanager
def whole_stream(plan: TensorParallel | None) -> Iterator[None]:
    """Every rank holds the whole stream meanwhile, whatever its length: for generation."""
    if plan is None:
        yield
        return
    before, plan.sequence_parallel = plan.sequence_parallel, False
    try:
        yield
    finally:
        plan.sequence_parallel = before
