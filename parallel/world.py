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
        """What torchrun's variables say of this process; one process alone without them.

        Raises `ConfigError` where they contradict each other, or where another launcher started several processes
        that know nothing of each other.
        """
        if not any(name in os.environ for name in ("RANK", "WORLD_SIZE")):
            _require_one_task()
            return cls(0, 1, 0, 1)
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                found = next(other for other in ("RANK", "WORLD_SIZE") if other in os.environ)
                raise ConfigError(
                    f"{found}={os.environ[found]} is set in the environment without {name}; if an earlier job left it, "
                    f"unset {found}, else start with torchrun, which sets them all."
                )
        rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        world = cls(rank, size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size))
        if not (0 <= rank < size and 0 <= world.local_rank < world.local_size <= size):
            raise ConfigError(
                f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={world.local_rank} and LOCAL_WORLD_SIZE="
                f"{world.local_size} in the environment contradict each other; unset them, or start with torchrun."
            )
        return world


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} in the environment is no whole number; unset it, or start with torchrun.")
    return int(text)


def _require_one_task() -> None:
    """Tasks of SLURM or MPI that are no ranks of torchrun would each train the whole run, all in one folder."""
    launchers = {
        "SLURM": ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
        "MPI": ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
        "MPI's process manager": ("PMI_RANK", ("PMI_SIZE",)),
    }
    for launcher, (rank, sizes) in launchers.items():
        size = next((os.environ[name] for name in sizes if name in os.environ), "1")
        if rank in os.environ and size.isdecimal() and int(size) > 1:
            raise ConfigError(
                f"started by {launcher} in {size} tasks without torchrun, so they do not know of each other; start one "
                "task a node: srun --ntasks-per-node 1 torchrun --nproc-per-node 8 ... (see launch/slurm/train.sbatch)."
            )


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


def prepare_allocators() -> None:
    """Have torch lay large tensors in huge pages of a CPU, and grow a GPU's segments in place, unless told otherwise.

    Both are read when the first tensor is made. Huge pages spare a tenth to a fifth of a step on a CPU: without them
    every fresh buffer costs a page fault for each 4 KiB.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


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
