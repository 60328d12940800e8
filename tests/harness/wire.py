"""Bytes that a rank sends, counted at the dispatcher: what each collective of a step must move."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class WireCounter(TorchDispatchMode):
    """Bytes this rank sends, by (name of the mesh axis, collective), as a ring or pairwise algorithm sends them.

    all_gather: its own part to each other rank. reduce_scatter: the other ranks' parts of its own
    tensor. all_reduce: both. all_to_all and send: what goes to others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next((_group(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _group(arg)), None)
        if group is None:
            return
        n, axis = group.size(), group.group_desc.removeprefix("mesh_")
        if name == "_allgather_base_":
            sent = (n - 1) * _bytes(args[1])
        elif name == "_reduce_scatter_base_":
            sent = _bytes(args[1]) // n * (n - 1)
        elif name == "allreduce_":
            sent = 2 * _bytes(args[0]) * (n - 1) // n
        elif name == "alltoall_base_":
            x, splits = args[1], args[4] or [args[1].shape[0] // n] * n
            sent = (sum(splits) - splits[group.rank()]) * x[:1].numel() * x.element_size()
        elif name == "send":
            sent = _bytes(args[0])
        else:
            return
        self.sent[(axis, name.strip("_").removesuffix("_base"))] += sent


def _group(argument: Any) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(argument)
    except RuntimeError:
        return None


def _bytes(tensors: Any) -> int:
    parts = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(t.numel() * t.element_size() for t in parts)
