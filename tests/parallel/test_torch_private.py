"""What is used of torch without being documented is there, and does what it is used for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Shard

from parallel import torch_private
from parallel.world import World
from tests.harness.distributed import run_ranks


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (torch_private.FSDPMeshInfo, ["mesh", "shard_mesh_dim"]),
        (torch_private.HSDPMeshInfo, ["mesh", "shard_mesh_dim", "replicate_mesh_dim"]),
        (torch_private.ShardPlacementResult, ["placement", "mesh_info"]),
        (torch_private.compute_local_shape_and_global_offset, ["global_shape", "mesh", "placements"]),
        (dist.distributed_c10d._get_default_store, []),
        (FSDPModule._get_fsdp_state, ["self"]),
        (FSDPParam.accumulate_unsharded_grad_if_needed, ["self"]),
        (FSDPParam.to_accumulated_grad_if_needed, ["self"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_private_name_takes_what_it_took(function: Callable[..., Any], parameters: list[str]) -> None:
    found = list(inspect.signature(function).parameters)
    assert [name for name in found if name in parameters] == parameters


def test_private_names_do_what_they_are_used_for() -> None:
    def on_rank(world: World) -> tuple[tuple[int, ...], bool, list[float]]:
        mesh = init_device_mesh("cpu", (2,))
        part = DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)])
        linear = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.ones_(linear.weight)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(linear, mesh=mesh, mp_policy=policy)
        assert isinstance(linear, FSDPModule)
        linear.set_requires_gradient_sync(False)
        linear(torch.ones(1, 2)).sum().backward()
        (group,) = linear._get_fsdp_state()._fsdp_param_groups
        (parameter,) = group.fsdp_params
        parameter.unsharded_param.grad = torch.full((2, 2), 2.0, dtype=torch.bfloat16)  # what is made behind a backward
        torch_private.accumulate_gradients(linear)
        torch_private.default_store().set(f"seen {world.rank}", "yes")
        seen = torch_private.default_store().check([f"seen {world.rank}"])
        kept = parameter.unsharded_accumulated_grad
        assert kept is not None and kept.dtype == torch.float32
        return torch_private.global_offset(part), seen, kept.flatten().tolist()

    assert run_ranks(2, on_rank) == [((0, 0), True, [3.0] * 4), ((3, 0), True, [3.0] * 4)]
