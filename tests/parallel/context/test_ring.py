"""The ring's order of work: blocks travel while those that are here are attended to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.masks import attention_mask
from parallel.collectives import RingTransfer
from parallel.context import ring
from parallel.world import World
from tests.harness.distributed import all_ranks, run_ranks


def test_a_block_is_attended_to_while_the_next_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was issued in which order, forward and backward, on each of three ranks."""
    order: list[str] = []

    def noted(place: Any, name: str, word: str) -> None:
        function = getattr(place, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            order.append(word)
            return function(*args, **kwargs)

        monkeypatch.setattr(place, name, call)

    noted(ring, "ring_send_recv", "send")
    noted(ring, "partial_attention", "attend")
    noted(RingTransfer, "wait", "wait")

    def on_rank(world: World) -> list[str]:
        torch.manual_seed(world.rank)
        q, k, v = (torch.randn(4, heads, 8, requires_grad=True) for heads in (2, 1, 1))
        parts = (attention_mask(1, 4),) * 3  # every query sees something of each block
        out = ring.ring_attention(q, (k, v), None, ring.as_they_are, parts, all_ranks())
        out.sum().backward()
        return order

    there = ["send", "attend", "wait", "send", "attend", "wait", "attend"]
    # a block and, a step behind, the sums of its gradients
    back = [
        "send",
        "attend",
        "send",
        "wait",
        "send",
        "attend",
        "wait",
        "send",
        "wait",
        "attend",
        "wait",
        "send",
        "wait",
    ]
    for found in run_ranks(3, on_rank):
        assert found == there + back
