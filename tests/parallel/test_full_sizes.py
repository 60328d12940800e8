"""The released sizes on large meshes: every plan fits them, and no rank holds much more than its share.

Process groups are fake and tensors on `meta`, so that a model of any size builds as one rank of hundreds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import Gemma4Config
from parallel.apply import build_parallel_model
from parallel.layout import Layout, resolve_layout
from parallel.mesh import build_mesh
from tests.harness.meshes import plans
from tests.harness.report import report

LENGTH = 8192
CASES = [
    ("e2b", Layout(pp=4, dp_shard=8, cp=2, tp=2)),
    ("e4b", Layout(dp_shard=16, cp=4, tp=4)),
    ("12b", Layout(dp_replicate=4, dp_shard=8, tp=8)),
    ("26b_a4b", Layout(dp_shard=256)),
    ("26b_a4b", Layout(dp_shard=128, ep=128)),
    ("26b_a4b", Layout(pp=2, dp_shard=8, tp=4, ep=32)),
    ("31b", Layout(dp_shard=8, tp=32)),
]


@pytest.mark.parametrize(("variant", "layout"), CASES, ids=str)
def test_every_rank_holds_its_share(variant: str, layout: Layout) -> None:
    config = Gemma4Config.from_name(variant)
    resolve_layout(layout.world_size, layout, config, LENGTH)
    options = plans({"activation_checkpoint.mode": "full"})
    shares = []
    for rank in (0, layout.world_size - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            mesh = build_mesh(torch.device("cpu"), layout)
            about: dict[str, Any] = {"compute_dtype": torch.bfloat16, "sequence_length": LENGTH}
            model = build_parallel_model(
                config, mesh, torch.device("meta"), lambda slices: None, options, **about
            ).model
        finally:
            dist.destroy_process_group()
        parameters = list(model.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        shares.append(held * layout.sharding / sum(p.numel() for p in parameters))
    report(
        "Parameters a rank holds, of an even share",
        {"variant": variant, "mesh": layout, "first": f"{shares[0]:.3f}", "last": f"{shares[1]:.3f}"},
    )
    assert min(shares) > 0.95 and max(shares) < 1.02
