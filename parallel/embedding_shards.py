"""Embedding tables whose rows live sharded and are never gathered.

These are the per-layer table (2.35 B numbers in E2B, 2.82 B in E4B), and the token table of a
pipeline's first stage (1.41 B in 31B), which elsewhere is the head too, and so needed whole. A
look-up asks the owners for the rows of its unique ids and gives their gradients back the same
way. To optimizer, clipping and checkpoint a table is a parameter sharded by rows like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model import Gemma4
from parallel.collectives import RowOwners, fetch_rows, gather_tokens
from parallel.dtensors import sharded_parameter
from parallel.mesh import Mesh
from parallel.pipeline.stage import Gemma4Stage
from parallel.tensor.tokens import TensorParallel


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
        _, offset = compute_local_shape_and_global_offset(table.weight.shape, mesh, placements)
        shards = mesh.size(mesh.ndim - 1)
        self.owners = RowOwners(
            mesh.get_group(mesh.ndim - 1),
            mesh.get_group(0) if mesh.ndim > 1 else None,
            rows_per_rank=-(-table.weight.shape[0] // shards),
            first_row=offset[0],
        )

    def forward(self, ids_T: Tensor) -> Tensor:
        plan = self.plan
        if plan is None:
            return self._fetch(ids_T)
        share = plan.my_tokens(len(ids_T))
        if plan.sequence_parallel:
            return self._fetch(ids_T[share])
        most = -(-len(ids_T) // plan.size)
        mine = F.pad(ids_T[share], (0, most - (share.stop - share.start)), value=self.padding_idx)
        return gather_tokens(self._fetch(mine), plan.group)[: len(ids_T)]

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
