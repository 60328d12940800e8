"""Processes, their devices, and the groups they form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.config import ConfigError
from parallel.layout import Layout

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class World:
    """This process among all, as torchrun (or nothing) set it up."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> World:
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return cls(*(int(os.environ.get(name, default)) for name, default in defaults.items()))


def micro_batch_size(global_batch_size: int, wanted: int, num_ranks: int, multiple: int = 1) -> int:
    """Sequences a rank runs at once: the largest size up to `wanted` that divides its share.

    The number of micro-batches is a `multiple` if any size makes it so.

    Raises `ConfigError` if the global batch cannot be dealt evenly.
    """
    if global_batch_size % num_ranks:
        down, up = global_batch_size // num_ranks * num_ranks, -(-global_batch_size // num_ranks) * num_ranks
        near = up if down == 0 or up - global_batch_size < global_batch_size - down else down
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} does not divide among {num_ranks} data-parallel ranks; "
            f"nearest: {near}."
        )
    share = global_batch_size // num_ranks
    sizes = [size for size in range(1, min(wanted, share) + 1) if share % size == 0]
    return max((size for size in sizes if share // size % multiple == 0), default=max(sizes))


def init_process_group(world: World, device: torch.device) -> None:
    """Join the other processes; alone, form a group of one. CPU tensors always go over gloo."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@dataclass(frozen=True)
class Mesh:
    """Groups of ranks. Parameters live on one of three meshes, by what splits them besides FSDP.

    | mesh      | axes                              | parameters                                        |
    |-----------|-----------------------------------|---------------------------------------------------|
    | `whole`   | dp_replicate, dp_shard x cp x tp  | split by nothing else; ranks of tp add gradients  |
    | `split`   | dp_replicate, dp_shard x cp, tp   | split by tensor parallel                          |
    | `experts` | dp_replicate, what is left, ep    | experts                                           |

    The first axis is left out where it is 1. All are of this rank's pipeline stage.
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
        return self.split["tp"]

    @property
    def ep(self) -> DeviceMesh:
        return self.experts["ep"]

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Groups that together make up all ranks of this rank's stage."""
        shards = self.whole["whole_shard"].get_group()
        return [shards, self.whole["dp_replicate"].get_group()] if self.layout.dp_replicate > 1 else [shards]

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


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """One of `DTYPES`; auto is bfloat16 on a GPU and float32 on a CPU."""
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, wanted)
    assert isinstance(dtype, torch.dtype)
    return dtype


def select_device(wanted: str, world: World) -> torch.device:
    """The device of this process. Raises `ConfigError`, on all ranks of a node alike, if there are not enough."""
    found = torch.cuda.device_count()
    if wanted == "cuda" or (wanted == "auto" and found):
        if world.local_size > found:
            raise ConfigError(
                f"{world.local_size} processes on this node, but it shows {found} GPUs; "
                f"{f'start at most {found} or ' if found else ''}set run.device=cpu."
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")
