"""Embedding tables whose rows live sharded and are never gathered.

These are the per-layer table (2.35 B numbers in E2B, 2.82 B in E4B), and the token table of a
pipeline's first stage without tensor parallel (1.41 B in 31B), which elsewhere is the head too, and so needed whole. A
look-up asks the owners for the rows of its unique ids and gives their gradients back the same
way. To optimizer, clipping and checkpoint a table is a parameter sharded by rows like any other.

Letters of this file: R the rows of a table that a rank holds, C columns, U unique ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from model import Gemma4
from model.precision import upcast
from parallel.collectives import all_to_all_rows, exchange_counts
from parallel.dtensors import sharded_parameter
from parallel.mesh import Mesh
from parallel.pipeline.stage import Gemma4Stage
from parallel.tensor.tokens import TensorParallel
from parallel.torch_private import global_offset


class RowOwners(NamedTuple):
    """Who holds which rows of a table: `rows_per_rank` in a row on each rank of `shards`, here from `first_row`.

    `replicas` are the ranks that hold the same rows, or None if there are no others.
    """

    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    rows_per_rank: int
    first_row: int


class ShardedRows(nn.Module):
    """In place of an `nn.Embedding` on `meta`; its rows lie over all ranks of a mesh [dp_replicate, shards].

    Under tensor parallel a rank fetches the rows of its run of tokens; without sequence parallel
    the ranks then exchange them.
    """

    weight: nn.Parameter

    def __init__(
        self, table: nn.Embedding, mesh: DeviceMesh, compute_dtype: torch.dtype, plan: TensorParallel | None = None
    ) -> None:
        super().__init__()
        self.padding_idx, self.compute_dtype, self.plan = int(table.padding_idx or 0), compute_dtype, plan
        placements = (Replicate(), Shard(0))[-mesh.ndim :]
        self.weight = sharded_parameter(table.weight, mesh, placements)
        assert isinstance(self.weight, DTensor)
        shards = mesh.size(mesh.ndim - 1)
        self.owners = RowOwners(
            mesh.get_group(mesh.ndim - 1),
            mesh.get_group(0) if mesh.ndim > 1 else None,
            rows_per_rank=-(-table.weight.shape[0] // shards),
            first_row=global_offset(self.weight)[0],
        )

    def forward(self, ids_T: Tensor) -> Tensor:
        """Rows [T, C] of tokens, fetched from the ranks that hold them."""
        plan = self.plan
        if plan is None:
            return self._fetch(ids_T)
        mine = self._fetch(ids_T[plan.my_tokens(len(ids_T))])
        return mine if plan.sequence_parallel else plan.gather_my_tokens(mine, len(ids_T))

    def _fetch(self, ids_T: Tensor) -> Tensor:
        assert isinstance(self.weight, DTensor)
        return fetch_rows(self.weight.to_local(), ids_T, self.owners, self.padding_idx, self.compute_dtype)


def shard_embedding_rows(
    model: Gemma4, mesh: Mesh, compute_dtype: torch.dtype, plan: TensorParallel | None
) -> set[nn.Parameter]:
    """Replace the tables that need not be gathered; the parameters that FSDP must leave alone."""
    text = model.language_model
    names = ["embed_tokens_per_layer"]
    if isinstance(model, Gemma4Stage) and not model.is_last and plan is None:  # tensor parallel split it already
        names.append("embed_tokens")
    ignored = set()
    for name in names:
        table = getattr(text, name, None)
        if table is not None:
            rows = ShardedRows(table, mesh.fsdp(mesh.whole), compute_dtype, plan)
            setattr(text, name, rows)
            ignored.add(rows.weight)
    return ignored


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
        sorted_T, order_T = ids_T.sort()  # so by owner
        is_first_T = torch.ones_like(sorted_T, dtype=torch.bool)
        is_first_T[1:] = sorted_T[1:] != sorted_T[:-1]
        inverse_T = torch.empty_like(order_T).scatter_(0, order_T, is_first_T.cumsum(0) - 1)
        wanted = torch.zeros(owners.shards.size(), dtype=torch.long, device=ids_T.device)
        wanted.scatter_add_(0, sorted_T // owners.rows_per_rank, is_first_T.long())
        # The only time that the host waits for the device, which has done little yet.
        sends, receives = torch.stack((wanted, exchange_counts(wanted, owners.shards))).tolist()
        unique_U = sorted_T[torch.nonzero_static(is_first_T, size=sum(sends))[:, 0]]
        asked_ids = all_to_all_rows(unique_U, sends, receives, owners.shards)
        local = (asked_ids - owners.first_row).to(table_RC.device)
        rows_UC = all_to_all_rows(table_RC[local].to(ids_T.device, dtype), receives, sends, owners.shards)
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
        grads = all_to_all_rows(grad_UC, ctx.sends, ctx.receives, ctx.owners.shards)
        shape, device = ctx.table
        ids = local.to(grads.device)
        if ctx.owners.replicas is not None:
            ids, grads = _from_all_replicas(ids, grads, ctx.owners.replicas)
        # In the order of ranks, so replicas, which add up the same, stay the same.
        ids, grads = ids.to(device), grads.to(device)
        table_grad = grads.new_zeros(shape).index_add_(0, ids, grads)
        return table_grad, None, None, None, None


def _from_all_replicas(ids: Tensor, grads: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Ids and gradients of all replicas, end to end; they come padded to one length."""
    count = torch.tensor([len(ids)], device=ids.device)
    counts = torch.empty(group.size(), dtype=count.dtype, device=ids.device)
    dist.all_gather_single(counts, count, group=group)
    held = counts.tolist()
    most = max(held)
    real = torch.arange(most, device=ids.device)[None, :] < counts[:, None]
    place = torch.nonzero_static(real.flatten(), size=sum(held))[:, 0]
    found = []
    for mine in (ids, grads):
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        every = mine.new_empty(group.size() * most, *mine.shape[1:])
        dist.all_gather_single(every, padded, group=group)
        found.append(every[place])
    return found[0], found[1]
