"""The split token table: rows, scores, loss and gradients of one process, and nothing as large as the whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo  # what DTensor imports on first use: once here, not in every rank
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.head import Head, Tiles, linear_cross_entropy, softcapped_logits
from parallel.tensor.tokens import TensorParallel, tokens_on_every_rank
from parallel.tensor.vocabulary import VocabParallelEmbedding, VocabParallelHead
from parallel.world import World
from tests.harness.compare import hold, relative_error
from tests.harness.distributed import run_ranks
from tests.harness.report import report

CAP = 10.0
SIZES = [(2, 24), (4, 37), (8, 9)]  # even; the last rank fewer; ranks with one row and with none


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plan_of(ranks: int) -> TensorParallel:
    return TensorParallel(init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",)), sequence_parallel=True)


def split(whole_VD: Tensor, plan: TensorParallel, padding_idx: int = 0) -> VocabParallelEmbedding:
    """The table on this rank."""
    with torch.device("meta"):
        plain = nn.Embedding(whole_VD.shape[0], whole_VD.shape[1], padding_idx=padding_idx)
    table = VocabParallelEmbedding(plain, plan).to_empty(device="cpu").to(whole_VD.dtype)
    local = local_of(table.weight)
    with torch.no_grad():
        local.copy_(whole_VD[table.first_row : table.first_row + len(local)])
    return table


def local_of(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


@dataclass(frozen=True)
class LossCase:
    tokens: int
    tiles: Tiles | None = None
    z_loss: float = 0.0
    dtype: torch.dtype = torch.float32
    width: int = 6

    def tensors(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, table and labels; scores reach the bend of the cap, and labels repeat."""
        labels = torch.randint(0, rows, (self.tokens,), generator=torch.Generator().manual_seed(7))
        return (
            drawn(1, self.tokens, self.width).to(self.dtype),
            3 * drawn(2, rows, self.width).to(self.dtype),
            labels,
        )


LOSS_CASES = [
    LossCase(23, tiles=Tiles(7, 11), z_loss=0.01),
    LossCase(23),
    LossCase(1, z_loss=0.01),
    LossCase(0, z_loss=0.01),
    LossCase(23, tiles=Tiles(7, 11), z_loss=0.01, dtype=torch.bfloat16),
]


class Loss(NamedTuple):
    """On one rank: total, nll and z, its part of the gradient of the hidden states, and that of its rows."""

    values: list[Tensor]
    grad_hidden: Tensor
    grad_rows: Tensor


def split_loss(
    case: LossCase, rows: int, plan: TensorParallel, watch: AbstractContextManager[Any] | None = None
) -> Loss:
    hidden, weight, labels = case.tensors(rows)
    table = split(weight, plan)
    hidden.requires_grad_()
    with watch or nullcontext():
        loss = VocabParallelHead(CAP, plan)(hidden, table.weight, labels, case.z_loss, case.tiles)
        (loss.total / 7).backward()
    assert hidden.grad is not None
    return Loss([value.detach() for value in loss], hidden.grad, local_of(table.weight.grad))


def split_log_probs(rows: int, plan: TensorParallel) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and with weights known only afterwards this rank's part of both gradients."""
    hidden, weight, labels, weights = log_probs_tensors(rows)
    table = split(weight, plan)
    hidden.requires_grad_()
    found = VocabParallelHead(CAP, plan).log_probs(hidden, table.weight, labels, Tiles(7, 11))
    found.backward(weights)
    assert hidden.grad is not None
    return found.detach(), hidden.grad, local_of(table.weight.grad)


def log_probs_tensors(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, labels = LossCase(23, dtype=torch.float64).tensors(rows)
    return hidden, weight, labels, drawn(11, 23).double()


class LookUp(NamedTuple):
    """On one rank: rows of its share of the tokens, then of all of them, each with the gradient of its own rows."""

    dtype: torch.dtype
    share: Tensor
    grad_share: Tensor
    whole: Tensor
    grad_whole: Tensor


def split_look_up(dtype: torch.dtype, rows: int, plan: TensorParallel) -> LookUp:
    ids, weight, factors, padding = look_up_tensors(dtype, rows)
    table = split(weight, plan, padding)
    share = table(ids)
    (share * factors[plan.my_tokens(len(ids))]).sum().backward()
    grad_share, table.weight.grad = local_of(table.weight.grad), None
    with tokens_on_every_rank(plan):
        whole = table(ids)
    (whole * factors * (plan.rank + 1)).sum().backward()  # a part of what all ranks have alike
    return LookUp(dtype, share.detach(), grad_share, whole.detach(), local_of(table.weight.grad))


def look_up_tensors(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Repeated ids, padding, and rows that nobody asks for."""
    tokens, padding = 16, rows // 2
    ids = torch.randint(0, rows, (tokens,), generator=torch.Generator().manual_seed(5))
    ids[::5], ids[1:3] = padding, rows - 1
    return ids, drawn(6, rows, 6).to(dtype), drawn(8, tokens, 6), padding


def score_tensors(rows: int) -> tuple[Tensor, Tensor]:
    return drawn(3, 2, 3, 6), drawn(4, rows, 6)


def split_scores(rows: int, plan: TensorParallel) -> Tensor:
    hidden, weight = score_tensors(rows)
    table = split(weight, plan)
    with torch.no_grad():
        return VocabParallelHead(CAP, plan).logits(hidden, table.weight)


@cache
def on_ranks(ranks: int, rows: int) -> list[tuple[list[Loss], list[LookUp], Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Everything that is asked of the ranks of one size, in one start of them."""

    def run(world: World) -> tuple[list[Loss], list[LookUp], Tensor, tuple[Tensor, Tensor, Tensor]]:
        plan = plan_of(ranks)
        look_ups = [split_look_up(dtype, rows, plan) for dtype in (torch.float32, torch.bfloat16)]
        losses = [split_loss(case, rows, plan) for case in LOSS_CASES]
        return losses, look_ups, split_scores(rows, plan), split_log_probs(rows, plan)

    return run_ranks(ranks, run)


@pytest.mark.parametrize(("ranks", "rows"), SIZES)
def test_loss_and_gradients_are_those_of_one_process(ranks: int, rows: int) -> None:
    worst = {torch.float32: 0.0, torch.bfloat16: 0.0}
    by_case = zip(*(losses for losses, *_ in on_ranks(ranks, rows)), strict=True)
    for case, found in zip(LOSS_CASES, by_case, strict=True):
        hidden, weight, labels = case.tensors(rows)
        hidden.requires_grad_(), weight.requires_grad_()
        expected = linear_cross_entropy(hidden, weight, labels, softcap=CAP, z_loss=case.z_loss)
        (expected.total / 7).backward()
        assert hidden.grad is not None
        tight = case.dtype == torch.float32
        for loss in found:
            torch.testing.assert_close(loss.values, list(expected), rtol=1e-5 if tight else 1e-2, atol=1e-5)
            assert case.tokens < 2 or not torch.equal(loss.grad_hidden, hidden.grad)
        grads = (
            torch.stack([loss.grad_hidden for loss in found]).float().sum(0),
            torch.cat([loss.grad_rows for loss in found]),
        )
        for grad, leaf in zip(grads, (hidden, weight), strict=True):
            assert leaf.grad is not None
            error = float((grad - leaf.grad).float().norm() / leaf.grad.float().norm().clamp_min(1e-30))
            worst[case.dtype] = max(worst[case.dtype], error)
            assert error < (1e-5 if tight else 2e-2), case
    report(
        "Loss split by vocabulary against one process, relative errors of gradients",
        {"tp": ranks, "vocabulary": rows, **{str(k).removeprefix("torch."): f"{v:.1e}" for k, v in worst.items()}},
    )


@pytest.mark.parametrize(("ranks", "rows"), SIZES)
def test_log_probs_and_gradients_are_those_of_one_process(ranks: int, rows: int) -> None:
    hidden, weight, labels, weights = log_probs_tensors(rows)
    hidden.requires_grad_(), weight.requires_grad_()
    expected = Head(CAP).log_probs(hidden, weight, labels)
    expected.backward(weights)
    assert hidden.grad is not None and weight.grad is not None
    found = [log_probs for *_, log_probs in on_ranks(ranks, rows)]
    for values, *_ in found:
        hold("log-probabilities split by vocabulary, float64", relative_error(values, expected), 1e-12)
    parts = (torch.stack([part for _, part, _ in found]).sum(0), torch.cat([part for *_, part in found]))
    for part, whole in zip(parts, (hidden.grad, weight.grad), strict=True):
        hold("gradients of log-probabilities split by vocabulary, float64", relative_error(part, whole), 1e-12)


@pytest.mark.parametrize(("ranks", "rows"), SIZES)
def test_scores_are_gathered_whole(ranks: int, rows: int) -> None:
    hidden, weight = score_tensors(rows)
    expected = softcapped_logits(hidden @ weight.T, CAP)
    for _, _, scores, _ in on_ranks(ranks, rows):
        torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(("ranks", "rows"), SIZES)
def test_embedding_is_that_of_one_process(ranks: int, rows: int) -> None:
    """The stream split among ranks, then whole on each."""
    for found in zip(*(look_ups for _, look_ups, *_ in on_ranks(ranks, rows)), strict=True):
        dtype = found[0].dtype
        ids, weight, factors, padding = look_up_tensors(dtype, rows)
        weight.requires_grad_()
        expected = nn.functional.embedding(ids, weight, padding_idx=padding)
        (expected * factors).sum().backward()
        assert weight.grad is not None
        assert torch.equal(torch.cat([one.share for one in found]), expected)
        assert all(torch.equal(one.whole, expected) for one in found)
        bound = 1e-5 if dtype == torch.float32 else 0.05
        by_share, by_parts = (
            torch.cat(grads) for grads in zip(*((f.grad_share, f.grad_whole) for f in found), strict=True)
        )
        for grad, parts in ((by_share, 1), (by_parts, ranks * (ranks + 1) // 2)):
            torch.testing.assert_close(grad / parts, weight.grad, rtol=bound, atol=bound)
            assert grad.any() and not grad[padding].any()


class Watch(TorchDispatchMode):
    """The most numbers any new tensor has, and how many numbers collectives were given."""

    largest, crossed = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.crossed += sum(t.numel() for t in tree_leaves(args[0]))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and not isinstance(t, DTensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_log_probs_hold_chunks_only_and_exchange_two_numbers_a_token() -> None:
    ranks, tokens, rows, width = 4, 40, 400, 8

    def run(world: World) -> tuple[int, int]:
        watch, plan = Watch(), plan_of(ranks)
        hidden, weight, labels = LossCase(tokens, width=width).tensors(rows)
        table = split(weight, plan)
        hidden.requires_grad_()
        with watch:
            VocabParallelHead(CAP, plan).log_probs(hidden, table.weight, labels, Tiles(10, 9)).sum().backward()
        return watch.largest, watch.crossed

    assert run_ranks(ranks, run) == [(10 * rows // ranks, 2 * tokens)] * ranks


def test_chunks_are_alike_on_uneven_ranks_and_nothing_is_as_large_as_the_table_or_all_scores() -> None:
    ranks = 4
    small = LossCase(40, tiles=Tiles(10, 40), z_loss=0.01, width=8)
    # So many tokens that chunks made for a rank's own rows, 10 or 7, would differ in number.
    many = LossCase(430_000, width=2)

    def run(world: World) -> tuple[int, int, float]:
        watch, plan = Watch(), plan_of(ranks)
        split_loss(small, 400, plan, watch)
        hidden, weight, labels = many.tensors(37)
        table = split(weight, plan)
        with torch.no_grad():
            return watch.largest, watch.crossed, float(VocabParallelHead(CAP, plan)(hidden, table.weight, labels).nll)

    hidden, weight, labels = many.tensors(37)
    expected = float(linear_cross_entropy(hidden, weight, labels, softcap=CAP).nll)
    assert small.tiles is not None
    for largest, crossed, nll in run_ranks(ranks, run, timeout=60):
        assert largest == small.tiles.tokens * 400 // ranks < 400 * small.width < 400 * small.tokens
        assert crossed == 2 * small.tokens
        assert nll == pytest.approx(expected, rel=1e-4)
