"""Each collective alone, in float64: what several ranks make, and its gradients, against a formula over all inputs.

A gradient is that of the sum over ranks of what each made, weighted by numbers of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel import collectives, embedding_shards
from parallel.world import World
from tests.harness.compare import hold, relative_error
from tests.harness.distributed import run_ranks

SIZES = (2, 3, 4)
PADDING, ROWS_PER_RANK = 1, 3


class Case(NamedTuple):
    inputs: Callable[[int], list[Tensor]]
    """One for each of so many ranks; replicas have the same tensor."""
    collective: Callable[[Tensor, World], Tensor]
    formula: Callable[[list[Tensor]], list[Tensor]]
    """What all ranks make of all inputs."""
    differentiable: bool = True


class Found(NamedTuple):
    value: Tensor
    gradient: Tensor | None


def drawn(seed: int, rows: int) -> Tensor:
    """[rows, 3] in float64; not contiguous, which collectives must stand."""
    return torch.randn(3, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).T


def alike(rows: int, size: int) -> list[Tensor]:
    return [drawn(rank, rows) for rank in range(size)]


def everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def on_all(function: Callable[[Tensor, dist.ProcessGroup], Tensor]) -> Callable[[Tensor, World], Tensor]:
    """The function over the group of all ranks."""
    return lambda x, world: function(x, everyone())


def sum_of(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0)


def exchange(rows: Callable[[int, int], int]) -> Case:
    """`rows(a, b)` rows cross from rank a to rank b."""

    def on_rank(x: Tensor, world: World) -> Tensor:
        sends = [rows(world.rank, other) for other in range(world.size)]
        receives = [rows(other, world.rank) for other in range(world.size)]
        return collectives.exchange_rows(x, sends, receives, everyone())

    def formula(xs: list[Tensor]) -> list[Tensor]:
        ranks = range(len(xs))
        parts = [x.split([rows(a, b) for b in ranks]) for a, x in enumerate(xs)]
        return [torch.cat([parts[a][b] for a in ranks]) for b in ranks]

    return Case(lambda size: [drawn(a, sum(rows(a, b) for b in range(size))) for a in range(size)], on_rank, formula)


def repeated(rank: int) -> list[int]:
    """Ids of every owner, some twice, and padding; each rank asks for another number of them."""
    return [PADDING, *((5 * rank + 7 * i) % 11 for i in range(4 + rank)), 2, 2, PADDING]


def from_second(rank: int) -> list[int]:
    return repeated(rank) if rank else []


def fetch(missing: int, asked: Callable[[int], list[int]] = repeated, replicas: bool = False) -> Case:
    """A table that lacks `missing` rows on the last of its owners.

    With replicas each of its rows is on two ranks of four, or on all ranks of fewer.
    """

    def owners_of(size: int) -> int:
        return (2 if size == 4 else 1) if replicas else size

    def ids_of(rank: int, size: int) -> Tensor:
        return torch.tensor(asked(rank), dtype=torch.int64) % (ROWS_PER_RANK * owners_of(size) - missing)

    def inputs(size: int) -> list[Tensor]:
        owners = owners_of(size)
        table = drawn(1, ROWS_PER_RANK * owners - missing)
        parts = [table[ROWS_PER_RANK * i : ROWS_PER_RANK * (i + 1)].clone() for i in range(owners)]
        return [parts[rank % owners] for rank in range(size)]

    def on_rank(table: Tensor, world: World) -> Tensor:
        owners = owners_of(world.size)
        shards = [dist.new_group(range(i, i + owners)) for i in range(0, world.size, owners)]
        same_rows = [dist.new_group(range(i, world.size, owners)) for i in range(owners)]
        place = world.rank % owners
        others = same_rows[place] if replicas else None
        held = embedding_shards.RowOwners(shards[world.rank // owners], others, ROWS_PER_RANK, ROWS_PER_RANK * place)
        return embedding_shards.fetch_rows(table, ids_of(world.rank, world.size), held, PADDING, torch.float64)

    def formula(parts: list[Tensor]) -> list[Tensor]:
        table = torch.cat(parts[: owners_of(len(parts))])
        return [F.embedding(ids_of(rank, len(parts)), table, padding_idx=PADDING) for rank in range(len(parts))]

    return Case(inputs, on_rank, formula)


def swap_ends(x: Tensor, world: World) -> Tensor:
    """The first and the last rank change places; with more ranks, their group is not all."""
    group = dist.new_group([0, world.size - 1])
    return x if 0 < world.rank < world.size - 1 else collectives.send_recv(x, int(world.rank == 0), group)


def around(x: Tensor, world: World) -> Tensor:
    """Two tensors of different shapes."""
    return torch.cat(collectives.ring_send_recv((x[:1], x[1:]), everyone()).wait())


def counts(size: int) -> list[Tensor]:
    return [torch.tensor([3 * a + b for b in range(size)]) for a in range(size)]


CASES = {
    "all_reduce": Case(partial(alike, 4), on_all(collectives.all_reduce), lambda xs: [sum_of(xs)] * len(xs)),
    "gather_tokens": Case(partial(alike, 4), on_all(collectives.gather_tokens), lambda xs: [torch.cat(xs)] * len(xs)),
    "gather_tokens of none": Case(
        partial(alike, 0), on_all(collectives.gather_tokens), lambda xs: [torch.cat(xs)] * len(xs)
    ),
    "scatter_tokens": Case(
        partial(alike, 12), on_all(collectives.scatter_tokens), lambda xs: list(sum_of(xs).chunk(len(xs)))
    ),
    "exchange_rows": exchange(lambda a, b: (a + 2 * b) % 3),
    "exchange_rows, the first sends none": exchange(lambda a, b: a * (1 + b)),
    "exchange_rows, the first receives none": exchange(lambda a, b: b * (1 + a)),
    "exchange_rows of none": exchange(lambda a, b: 0),
    "fetch_rows": fetch(0),
    "fetch_rows, the last owns fewer": fetch(2),
    "fetch_rows, the last owns none": fetch(ROWS_PER_RANK),
    "fetch_rows, the first asks for none": fetch(0, from_second),
    "fetch_rows, nobody asks": fetch(0, lambda rank: []),
    "fetch_rows of replicas": fetch(1, replicas=True),
    "fetch_rows of replicas, the first asks for none": fetch(0, from_second, replicas=True),
    "all_reduced": Case(partial(alike, 4), on_all(collectives.all_reduced), lambda xs: [sum_of(xs)] * len(xs), False),
    "send_recv": Case(partial(alike, 4), swap_ends, lambda xs: [xs[-1], *xs[1:-1], xs[0]], False),
    "ring_send_recv": Case(partial(alike, 4), around, lambda xs: [xs[-1], *xs[:-1]], False),
    "exchange_counts": Case(counts, on_all(collectives.exchange_counts), lambda xs: list(torch.stack(xs).T), False),
}


def weighted(value: Tensor, rank: int) -> Tensor:
    return (value * drawn(100 + rank, len(value))).sum()


@pytest.fixture(scope="module", params=SIZES)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Found]]:
    """What each rank found in each case: all of it in one start of the ranks."""

    def run(world: World) -> dict[str, Found]:
        found = {}
        for name, case in CASES.items():
            x = case.inputs(world.size)[world.rank].requires_grad_(case.differentiable)
            value = case.collective(x, world)
            if case.differentiable:
                weighted(value, world.rank).backward()
            found[name] = Found(value.detach(), x.grad)
        return found

    return run_ranks(request.param, run, timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(ranks: list[dict[str, Found]], name: str) -> None:
    case = CASES[name]
    inputs = [x.requires_grad_(case.differentiable) for x in case.inputs(len(ranks))]
    values = case.formula(inputs)
    if case.differentiable:
        torch.stack([weighted(value, rank) for rank, value in enumerate(values)]).sum().backward()
    for rank, (value, x) in enumerate(zip(values, inputs, strict=True)):
        for what, found, expected in zip(Found._fields, ranks[rank][name], Found(value, x.grad), strict=True):
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
                error = relative_error(found, expected)
                hold(f"collectives against formulas: {what}", error, 1e-12, f"{name}, rank {rank}")
