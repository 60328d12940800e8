"""The groups that ranks form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """Groups of ranks. Parameters live on one of three meshes, by what splits them besides FSDP.

    | mesh      | axes                              | parameters                                        |
    |-----------|-----------------------------------|---------------------------------------------------|
    | `whole`   | dp_replicate, dp_shard x cp x tp  | split by nothing else; ranks of tp add gradients  |
    | `split`   | dp_replicate, dp_shard x cp, tp   | split by tensor parallel                          |
    | `experts` | dp_replicate, what is left, ep    | experts                                           |

    `fsdp` leaves the first axis out where it is 1. All are of this rank's pipeline stage.
    """

    layout: Layout
    at: dict[str, int]
    """This rank's place on each axis."""
    whole: DeviceMesh
    split: DeviceMesh
    experts: DeviceMesh
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup

    @property
    def tp(self) -> DeviceMesh:
        """The axis along which weights of a layer are split."""
        return self.split["tp"]

    @property
    def ep(self) -> DeviceMesh:
        """The axis along which experts are shared out."""
        return self.experts["ep"]

    @property
    def shards(self) -> dist.ProcessGroup:
        """All ranks among which the parameters of this rank's stage are split, in whatever way."""
        return self.whole["whole_shard"].get_group()

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Groups that together make up all ranks of this rank's stage."""
        replicas = [self.whole["dp_replicate"].get_group()] if self.layout.dp_replicate > 1 else []
        return [self.shards, *replicas]

    def fsdp(self, mesh: DeviceMesh) -> DeviceMesh:
        """The axes of a mesh over which FSDP shards and replicates."""
        names = [name for name in mesh.mesh_dim_names or () if name not in ("tp", "ep")]
        return mesh[tuple(names)] if self.layout.dp_replicate > 1 else mesh[names[-1]]


def build_mesh(device: torch.device, layout: Layout) -> Mesh:
    """Process groups of a layout; every rank must call it."""

    def view(**axes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    pp, replicas = layout.pp, layout.dp_replicate
    parts = ("dp_replicate",)
    whole = view(pp=pp, dp_replicate=replicas, whole_shard=layout.sharding)
    split = view(pp=pp, dp_replicate=replicas, split_shard=layout.dp_shard * layout.cp, tp=layout.tp)
    experts = view(pp=pp, dp_replicate=replicas, expert_shard=layout.sharding // layout.ep, ep=layout.ep)
    cp = view(pp=pp, dp=layout.dp, cp=layout.cp, tp=layout.tp)["cp"].get_group()
    return Mesh(
        layout,
        layout.coordinate(dist.get_rank()),
        whole[(*parts, "whole_shard")],
        split[(*parts, "split_shard", "tp")],
        experts[(*parts, "expert_shard", "ep")],
        cp,
        whole["pp"].get_group(),
    )
