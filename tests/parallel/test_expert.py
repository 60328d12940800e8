"""Experts over ranks against all of them on one: any routing, any number of tokens; the router's losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import Gemma4, Gemma4Config
from model.moe import Experts, Router
from parallel import collectives
from parallel.dtensors import local_part
from parallel.expert import ParallelExperts
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.options import MoEConfig
from parallel.router_losses import RouterBalance, read_balance
from parallel.tensor.tokens import TensorParallel
from parallel.world import World
from tests.harness.compare import relative_error
from tests.harness.distributed import all_ranks, run_ranks
from tests.harness.meshes import CPU, SMALL

EXPERTS, TOP_K, WIDTH = 8, 3, 32
CONFIG = Gemma4Config.from_name(
    "tiny_26b_a4b", **(SMALL | {"num_experts": EXPERTS, "top_k_experts": TOP_K, "moe_intermediate_size": 16})
)
ROUTINGS = ("router", "one expert for all", "one rank's experts only")


def whole_experts() -> Experts:
    torch.manual_seed(1)
    experts = Experts(CONFIG)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def tokens_of(rank: int, routing: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 1)
    x_TD = torch.randn(count, WIDTH, generator=generator)
    weights = torch.rand(count, TOP_K, generator=generator)
    if routing == "one expert for all":
        indices = torch.tensor([5, 0, 7]).expand(count, TOP_K)
    elif routing == "one rank's experts only":
        indices = torch.tensor([0, 1, 0]).expand(count, TOP_K)
    else:
        indices = torch.rand(count, EXPERTS, generator=generator).topk(TOP_K).indices
    return x_TD.requires_grad_(), weights.requires_grad_(), indices


def nothing() -> Tensor:
    return torch.zeros(0)


def run(experts: nn.Module, x_TD: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out_TD, _ = experts(x_TD, weights, indices, nothing)
    (out_TD * torch.linspace(-1, 1, WIDTH)).sum().backward()
    assert x_TD.grad is not None and weights.grad is not None
    return out_TD.detach(), x_TD.grad, weights.grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_what_one_process_makes(ranks: int) -> None:
    counts = (5, 0, 17, 1)[:ranks]

    def on_rank(world: World) -> list[tuple[list[Tensor], list[Tensor]]]:
        mesh, found = build_mesh(CPU, Layout(dp_shard=ranks, ep=ranks)), []
        for routing in ROUTINGS:
            with torch.device("meta"):
                meta = Experts(CONFIG)
            experts = ParallelExperts(meta, mesh.ep)
            experts.to_empty(device="cpu")
            with torch.no_grad():
                for part, whole in zip(experts.parameters(), whole_experts().parameters(), strict=True):
                    local_part(part).copy_(whole.chunk(ranks)[world.rank])
            results = run(experts, *tokens_of(world.rank, routing, counts[world.rank]))
            assert all(p.grad is not None for p in experts.parameters()), "FSDP waits for a gradient on every rank"
            found.append((list(results), [p.grad.full_tensor() for p in experts.parameters()]))  # type: ignore[union-attr]
        return found

    everything = run_ranks(ranks, on_rank)
    for number, routing in enumerate(ROUTINGS):
        experts = whole_experts()
        for rank in range(ranks):
            expected = run(experts, *tokens_of(rank, routing, counts[rank]))
            for found, wanted in zip(everything[rank][number][0], expected, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        for found, parameter in zip(everything[0][number][1], experts.parameters(), strict=True):
            assert parameter.grad is not None and relative_error(found, parameter.grad) < 1e-5


def test_ranks_that_hold_the_same_tokens_share_them() -> None:
    """Seven tokens over two ranks: each takes a run, and all outputs come back."""
    expected = run(whole_experts(), *tokens_of(0, "router", 7))

    def on_rank(world: World) -> list[Tensor]:
        mesh = build_mesh(CPU, Layout(tp=2, ep=2))
        with torch.device("meta"):
            meta = Experts(CONFIG)
        experts = ParallelExperts(meta, mesh.ep, TensorParallel(mesh.tp, sequence_parallel=False))
        experts.to_empty(device="cpu")
        with torch.no_grad():
            for part, whole in zip(experts.parameters(), whole_experts().parameters(), strict=True):
                local_part(part).copy_(whole.chunk(2)[world.rank])
        out, *grads = run(experts, *tokens_of(0, "router", 7))
        for grad in grads:  # parts, of an upstream gradient that each rank gave in full
            dist.all_reduce(grad)
        return [out, *(grad / 2 for grad in grads)]

    for found in run_ranks(2, on_rank):
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)


def test_the_dense_branch_runs_while_tokens_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was issued in which order, forward and backward, on each rank."""
    order: list[str] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            order.append("dense")
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            order.append("dense")
            return grad * 2

    def noted(name: str) -> None:
        method = getattr(collectives._Travel, name)

        def call(travel: collectives._Travel, *args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return method(travel, *args, **kwargs)

        monkeypatch.setattr(collectives._Travel, name, call)

    noted("begin")
    noted("finish")

    def on_rank(world: World) -> tuple[list[str], Tensor]:
        with torch.device("meta"):
            meta = Experts(CONFIG)
        experts = ParallelExperts(meta, build_mesh(CPU, Layout(dp_shard=2, ep=2)).ep)
        experts.to_empty(device="cpu")
        for parameter in experts.parameters():
            nn.init.ones_(local_part(parameter))
        x_TD, weights, indices = tokens_of(world.rank, "router", 6)
        routed, dense = experts(x_TD, weights, indices, lambda: Noted.apply(x_TD))
        there = order.copy()
        order.clear()
        (routed.sum() + dense.sum()).backward()
        return [*there, "|", *order], dense.detach() - 2 * x_TD.detach()

    for found, difference in run_ranks(2, on_rank):
        # tokens, weights and indices there; gradients of the first two back
        assert found == [*["begin"] * 3, "dense", *["finish"] * 3, "|", *["begin"] * 2, "dense", *["finish"] * 2]
        assert not difference.any()


def test_router_losses_are_means_over_all_ranks() -> None:
    balance, z, ranks, counts = 0.3, 0.07, 4, (5, 0, 17, 10)

    def router() -> Router:
        torch.manual_seed(3)
        made = Router(CONFIG)
        nn.init.normal_(made.proj.weight)
        return made

    def scores_of(made: Router, x_TD: Tensor) -> Tensor:
        return made.proj(made.norm(x_TD) * made.scale * made.root_size)

    def on_rank(world: World) -> tuple[Tensor, dict[str, float]]:
        made = router()
        made.observer = RouterBalance(0, EXPERTS, [all_ranks()], MoEConfig(balance, z))
        weights, _ = made(tokens_of(world.rank, "router", counts[world.rank])[0])
        (weights.sum() * 0).backward()  # the objective does not matter: the losses enter by themselves
        grad = made.proj.weight.grad
        assert grad is not None
        dist.all_reduce(grad)
        config = CONFIG.replace(num_hidden_layers=1)
        return grad, read_balance([made.observer], config)

    made = router()
    scores = scores_of(made, torch.cat([tokens_of(rank, "router", counts[rank])[0] for rank in range(ranks)]))
    probabilities = scores.softmax(dim=-1)
    choices = torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    balance_loss = EXPERTS * (choices / choices.sum() * probabilities.mean(dim=0)).sum()
    z_loss = scores.logsumexp(dim=-1).square().mean()
    (balance * balance_loss + z * z_loss).backward()
    assert made.proj.weight.grad is not None
    for grad, metrics in run_ranks(ranks, on_rank):
        assert relative_error(grad, made.proj.weight.grad) < 1e-5
        assert metrics["moe_balance_loss"] == pytest.approx(float(balance_loss.detach()), rel=1e-5)
        assert metrics["moe_router_z_loss"] == pytest.approx(float(z_loss.detach()), rel=1e-5)
        assert metrics["moe_imbalance/layer_00"] == pytest.approx(float(choices.max() / choices.float().mean()))
        assert metrics["moe_unused_experts"] == int((choices == 0).sum())


def test_nothing_is_added_where_no_loss_is_asked_for() -> None:
    model = Gemma4(CONFIG)
    scores = torch.randn(4, EXPERTS, requires_grad=True) * 1
    assert model.layers[0].router.observer is None
    RouterBalance(0, EXPERTS, [], MoEConfig())(scores, scores.topk(TOP_K).indices)
    assert not scores._backward_hooks
