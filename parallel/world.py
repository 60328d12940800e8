"""Processes and their devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from model.config import ConfigError

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
        """What torchrun's variables say of this process; one process alone without them."""
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return cls(*(int(os.environ.get(name, default)) for name, default in defaults.items()))


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
