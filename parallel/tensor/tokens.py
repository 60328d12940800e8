"""Tokens under tensor parallel: all on every rank, or on each rank its run of them (sequence parallel)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from model.inputs import Inputs, Kept, keep
from parallel.collectives import all_reduce, exchange_rows, gather_tokens, scatter_tokens


@dataclass
class TensorParallel:
    """The ranks of `tp`, and whether tokens are split among them right now."""

    mesh: DeviceMesh
    sequence_parallel: bool

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks among which tokens and weights are split."""
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.mesh.size()

    def all_gather_tokens(self, x_TD: Tensor) -> Tensor:
        """All tokens, for a product that is split."""
        return gather_tokens(x_TD, self.group) if self.sequence_parallel else x_TD

    def reduce_scatter_tokens(self, x_TD: Tensor) -> Tensor:
        """The sum of what the ranks' split products made, of which each keeps its tokens."""
        return scatter_tokens(x_TD, self.group) if self.sequence_parallel else all_reduce(x_TD, self.group)

    def my_tokens(self, tokens: int) -> slice:
        """This rank's run of so many tokens, which may not divide."""
        most = -(-tokens // self.size)
        return slice(min(self.rank * most, tokens), min((self.rank + 1) * most, tokens))

    def gather_my_tokens(self, x_TD: Tensor, tokens: int) -> Tensor:
        """All tokens on every rank, from its run of them on each."""
        missing = -(-tokens // self.size) - len(x_TD)
        return gather_tokens(F.pad(x_TD, (0, 0, 0, missing)), self.group)[:tokens]

    def deal(self, inputs: Inputs) -> Inputs:
        """Inputs of a rank that holds one run of the tokens, on the CPU; unchanged without sequence parallel."""
        if not self.sequence_parallel:
            return inputs
        held = len(inputs.tokens_T) // self.size

        def local(places: Tensor) -> Tensor:
            here = places - self.rank * held
            return here.where((here >= 0) & (here < held), -1)

        kept = None if inputs.kept is None else self._deal_kept(inputs, held)
        return replace(inputs, kept=kept, media=None if inputs.media is None else inputs.media.placed(local))

    def _deal_kept(self, inputs: Inputs, held: int) -> DealtKept:
        """The kept positions, as many for each rank: the last is repeated until their number divides."""
        assert inputs.kept is not None
        index = inputs.kept.index
        index = torch.cat((index, index[-1:].expand(-len(index) % self.size)))
        each = max(len(index) // self.size, 1)
        holder, taker = index // held, torch.arange(len(index)) // each
        mine = holder == self.rank
        sends, receives = (
            torch.bincount(ranks, minlength=self.size).tolist() for ranks in (taker[mine], holder[taker == self.rank])
        )
        local = index[mine] - self.rank * held
        return DealtKept(index, inputs.kept.count, keep(inputs.masks, index).masks, local, sends, receives, self.group)


@dataclass(frozen=True)
class DealtKept(Kept):
    """Kept positions of tokens that are split, dealt out anew so that each rank gets as many."""

    local: Tensor
    """Which of this rank's own tokens are kept, in order."""
    sends: list[int]
    receives: list[int]
    group: dist.ProcessGroup

    def take(self, x_TD: Tensor) -> Tensor:
        """Rows of the kept positions that were dealt to this rank, from whichever rank has them."""
        return exchange_rows(x_TD[self.local], self.sends, self.receives, self.group)

    def to(self, device: torch.device) -> Self:
        """The same positions with index and masks on a device."""
        return replace(super().to(device), local=self.local.to(device, non_blocking=True))


@contextmanager
def tokens_on_every_rank(plan: TensorParallel | None) -> Iterator[None]:
    """Meanwhile no rank holds a run of its own, so their number need not divide: for generation."""
    if plan is None:
        yield
        return
    before, plan.sequence_parallel = plan.sequence_parallel, False
    try:
        yield
    finally:
        plan.sequence_parallel = before
