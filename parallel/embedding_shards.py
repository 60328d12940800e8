"""The per-layer embedding table (2.35 B numbers in E2B, 2.82 B in E4B): its rows live sharded and are never gathered.

A look-up asks the owners for the rows of its unique ids and gives their gradients back the same
way. To optimizer, clipping and checkpoint the table is a parameter sharded by rows like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model import Gemma4
from parallel.collectives import RowOwners, fetch_rows


class ShardedRows(nn.Module):
    """In place of an `nn.Embedding` on `meta`; rows come out in `compute_dtype`."""

    weight: nn.Parameter

    def __init__(self, table: nn.Embedding, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.padding_idx, self.compute_dtype = int(table.padding_idx or 0), compute_dtype
        shape, replicas = table.weight.shape, mesh["dp_replicate"].size()
        over = mesh if replicas > 1 else mesh["dp_shard"]
        placements = (Replicate(), Shard(0)) if replicas > 1 else (Shard(0),)
        local_shape, offset = compute_local_shape_and_global_offset(shape, over, placements)
        local = torch.empty(local_shape, device="meta")
        stride = table.weight.stride()
        weight = DTensor.from_local(local, over, placements, run_check=False, shape=shape, stride=stride)
        self.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        self.owners = RowOwners(
            mesh["dp_shard"].get_group(),
            mesh["dp_replicate"].get_group() if replicas > 1 else None,
            rows_per_rank=-(-shape[0] // mesh["dp_shard"].size()),
            first_row=offset[0],
        )

    def forward(self, ids: Tensor) -> Tensor:
        assert isinstance(self.weight, DTensor)
        return fetch_rows(self.weight.to_local(), ids, self.owners, self.padding_idx, self.compute_dtype)


def shard_embedding_rows(model: Gemma4, mesh: DeviceMesh, compute_dtype: torch.dtype) -> set[nn.Parameter]:
    """Replace the per-layer table, if there is one; the parameters that FSDP must leave alone."""
    text = model.language_model
    if not model.config.hidden_size_per_layer_input:
        return set()
    assert isinstance(text.embed_tokens_per_layer, nn.Embedding)
    rows = ShardedRows(text.embed_tokens_per_layer, mesh, compute_dtype)
    text.embed_tokens_per_layer = rows
    return {rows.weight}
