"""Sizes a mesh may have, and the gradient norm over several meshes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from model import ConfigError, Gemma4, Gemma4Config
from model.init import random_fill
from parallel.apply import build_parallel_model
from parallel.grad_norm import clip_grad_norm
from parallel.layout import Layout, micro_batch_size
from parallel.mesh import build_mesh
from parallel.world import World, select_device
from tests.harness.distributed import run_ranks
from tests.harness.meshes import plans
from tests.harness.runs import whole_parameters


def test_micro_batches_divide_a_rank_s_share() -> None:
    assert micro_batch_size(32, 8, 2) == 8
    assert micro_batch_size(16, 6, 2) == 4
    assert micro_batch_size(16, 8, 16) == 1
    with pytest.raises(ConfigError, match="nearest: 18"):
        micro_batch_size(17, 8, 6)
    with pytest.raises(ConfigError, match="nearest: 8"):
        micro_batch_size(3, 8, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a machine without a GPU says")
def test_a_gpu_that_is_not_there_is_named() -> None:
    two = World(rank=1, size=2, local_rank=1, local_size=2)
    assert select_device("auto", two).type == "cpu"
    with pytest.raises(ConfigError, match=r"set run\.device=cpu"):
        select_device("cuda", two)


@pytest.mark.parametrize("name", ["gemma4_tiny_e4b", "gemma4_tiny_12b", "gemma4_tiny_26b_a4b"])
def test_sharded_initial_values_equal_those_of_one_process(name: str) -> None:
    config = Gemma4Config.from_name(name)
    whole = Gemma4(config)
    whole.init_weights(torch.Generator().manual_seed(5))
    expected = dict(whole.named_parameters())

    def ranks(world: World) -> dict[str, bool]:
        device = torch.device("cpu")
        mesh = build_mesh(device, Layout(dp_shard=world.size))
        fill = random_fill(5, config.initializer_range, config.pad_token_id)
        model = build_parallel_model(config, mesh, device, fill, plans({"activation_checkpoint.mode": "full"})).model
        assert isinstance(model, Gemma4) and all(layer.layer_scalar == 1 for layer in model.layers)
        return {name: torch.equal(tensor, expected[name]) for name, tensor in whole_parameters(model).items()}

    for found in run_ranks(3, ranks):
        assert found.keys() == expected.keys() and all(found.values())


def test_the_norm_over_mixed_meshes_is_the_norm_of_all() -> None:
    def ranks(world: World) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(8, 6, generator=generator) for _ in range(4)]
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        parameters = [
            torch.nn.Parameter(distribute_tensor(values[0], square, [Shard(0), Replicate()])),
            torch.nn.Parameter(distribute_tensor(values[1], square, [Replicate(), Shard(1)])),
            torch.nn.Parameter(distribute_tensor(values[2], square, [Shard(1), Shard(0)])),
            torch.nn.Parameter(values[3].clone()),
        ]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        found = clip_grad_norm(parameters, 1.0)
        after = clip_grad_norm(parameters, 1e9)
        expected = torch.stack([v.norm() for v in values]).norm()
        return float(found / expected), float(after)

    for ratio, after in run_ranks(4, ranks):
        assert abs(ratio - 1) < 1e-6 and abs(after - 1) < 1e-4
