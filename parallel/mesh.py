"""Processes and the mesh they form: axes, their sizes, and what is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.config import ConfigError, divisors

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float32")


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


def data_parallel_sizes(world_size: int, dp_replicate: int, dp_shard: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) with -1 filled in. Raises `ConfigError` naming legal sizes."""
    if dp_shard < 1 and dp_shard != -1:
        raise ConfigError(f"parallel.dp_shard={dp_shard} is no size; nearest: -1 (all ranks that are left).")
    if dp_shard == -1:
        if world_size % dp_replicate:
            raise ConfigError(
                f"parallel.dp_replicate={dp_replicate} does not divide the {world_size} ranks; "
                f"legal here: {divisors(world_size)}."
            )
        dp_shard = world_size // dp_replicate
    if dp_replicate * dp_shard != world_size:
        near = max(d for d in range(1, world_size + 1) if world_size % d == 0 and d <= max(dp_replicate, 1))
        raise ConfigError(
            f"parallel.dp_replicate={dp_replicate} x dp_shard={dp_shard} is not the {world_size} ranks of this run; "
            f"nearest: dp_replicate={near} dp_shard={world_size // near}."
        )
    return dp_replicate, dp_shard


def micro_batch_size(global_batch_size: int, wanted: int, num_ranks: int) -> int:
    """Sequences a rank runs at once: the largest size up to `wanted` that divides its share.

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
    return max(size for size in range(1, min(wanted, share) + 1) if share % size == 0)


def init_process_group(world: World, device: torch.device) -> None:
    """Join the other processes; alone, form a group of one. CPU tensors always go over gloo."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def build_mesh(device: torch.device, dp_replicate: int, dp_shard: int) -> DeviceMesh:
    return init_device_mesh(device.type, (dp_replicate, dp_shard), mesh_dim_names=("dp_replicate", "dp_shard"))


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """One of `DTYPES`; auto is bfloat16 on a GPU and float32 on a CPU."""
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


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
