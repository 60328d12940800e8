"""Row-sharded tables: values and gradients of a plain embedding, on every mesh, and what crosses the wire."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from parallel.embedding_shards import ShardedRows
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.world import World
from tests.harness.distributed import run_ranks
from tests.harness.report import report

CPU = torch.device("cpu")
WIDTH = 6


def ids_of(rank: int, rows: int) -> torch.Tensor:
    """Repeats, padding, and a rank that asks for one row only."""
    if rank == 1:
        return torch.full((5,), rows - 1)
    drawn = torch.randint(0, rows, (40,), generator=torch.Generator().manual_seed(rank))
    return torch.cat((drawn, drawn[:7], torch.zeros(3, dtype=torch.long)))


@pytest.mark.parametrize(
    ("ranks", "replicas", "rows", "dtype"),
    [
        (1, 1, 11, torch.float32),
        (2, 1, 11, torch.float32),
        (3, 1, 64, torch.float32),
        (4, 1, 3, torch.float32),  # a rank without rows
        (4, 2, 13, torch.float32),
        (4, 4, 13, torch.float32),
        (4, 2, 64, torch.bfloat16),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_a_plain_embedding(
    ranks: int, replicas: int, rows: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(9))
    factors = [
        torch.randn(len(ids_of(r, rows)), WIDTH, generator=torch.Generator().manual_seed(r)) for r in range(ranks)
    ]

    def run(world: World) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.device("meta"):
            plain = nn.Embedding(rows, WIDTH, padding_idx=0)
        mesh = build_mesh(CPU, Layout(dp_replicate=replicas, dp_shard=ranks // replicas))
        table = ShardedRows(plain, mesh.fsdp(mesh.whole), dtype)
        table.to_empty(device="cpu")
        assert isinstance(table.weight, DTensor)
        first, local = table.owners.first_row, table.weight.to_local()
        with torch.no_grad():
            local.copy_(weight[first : first + len(local)])
        for _ in range(2):  # gradients of micro-batches add up
            out = table(ids_of(world.rank, rows))
            (out * factors[world.rank]).sum().backward()
        assert out.dtype == dtype and isinstance(table.weight.grad, DTensor)
        return out.detach(), table.weight.grad.full_tensor()

    expected = weight.clone().requires_grad_()
    outs = [nn.functional.embedding(ids_of(r, rows), expected.to(dtype), padding_idx=0) for r in range(ranks)]
    torch.stack([2 * (out * factor).sum() for out, factor in zip(outs, factors, strict=True)]).sum().backward()
    for rank, (out, grad) in enumerate(run_ranks(ranks, run)):
        assert torch.equal(out, outs[rank].detach())
        torch.testing.assert_close(grad, expected.grad, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
        assert not grad[0].any()


def test_only_rows_that_are_used_cross() -> None:
    """Bytes a rank sends in forward and backward, against gathering the table and scattering its gradient."""
    rows, width, tokens, ranks = 4096, 32, 64, 4

    def run(world: World) -> int:
        with torch.device("meta"):
            plain = nn.Embedding(rows, width, padding_idx=0)
        mesh = build_mesh(CPU, Layout(dp_shard=ranks))
        table = ShardedRows(plain, mesh.fsdp(mesh.whole), torch.float32)
        table.to_empty(device="cpu")
        sent = 0
        exchange = dist.all_to_all_single

        def counting(
            out: torch.Tensor,
            x: torch.Tensor,
            receives: list[int] | None = None,
            sends: list[int] | None = None,
            group: dist.ProcessGroup | None = None,
        ) -> None:
            nonlocal sent
            kept = (sends or [len(x) // ranks] * ranks)[world.rank]
            sent += (len(x) - kept) * x[:1].numel() * x.element_size()
            exchange(out, x, receives, sends, group=group)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", counting)
            ids = torch.randint(1, rows, (tokens,), generator=torch.Generator().manual_seed(world.rank))
            table(ids).sum().backward()
        return sent

    most = max(run_ranks(ranks, run))
    gathered = 2 * (ranks - 1) * rows // ranks * width * 4
    needed = 2 * tokens * width * 4  # every row from another rank, its gradient back
    report(
        "Bytes a rank sends for the per-layer table, fp32",
        {"rows": rows, "tokens": tokens, "exchanged": most, "at most needed": needed, "gathered": gathered},
    )
    assert most < 1.3 * needed < gathered / 10
