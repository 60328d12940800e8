"""Between the arrival of a batch and its loss nothing asks a device for a number, which would make the host wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from parallel.apply import build_parallel_model
from parallel.embedding_shards import ShardedRows
from parallel.expert import ParallelExperts
from parallel.layout import Layout
from parallel.world import World
from tests.harness.distributed import run_ranks
from tests.harness.meshes import CPU, Case, initial_values, mesh_of, share_of
from tests.harness.report import report
from train.engine import Engine
from train.objective import CrossEntropy

NUMBERS = {"item", "tolist", "__int__", "__float__", "__bool__", "__index__"}
SIZES = {"nonzero", "unique", "unique_consecutive", "bincount", "masked_select"}


class Waits(TorchFunctionMode):
    """Counts calls whose result, or its size, is a value that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index):
                self.found["boolean index"] += 1
        elif name in NUMBERS | SIZES or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


CASES = {
    1: [Case("e2b"), Case("31b"), Case("26b_a4b")],
    2: [
        Case("e4b", Layout(tp=2)),
        Case("26b_a4b", Layout(tp=2, sequence_parallel=False)),
        Case("e2b", Layout(cp=2)),
        Case("31b", Layout(cp=2)),
        Case("31b", Layout(pp=2)),
        Case("26b_a4b", Layout(dp_shard=2, ep=2)),
    ],
    4: [
        Case("31b", Layout(tp=2, cp=2)),
        Case("12b", Layout(dp_shard=2, tp=2)),
        Case("26b_a4b", Layout(dp_shard=2, ep=2, tp=2)),
        Case("e2b", Layout(dp_replicate=2, dp_shard=2)),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_a_step_asks_for_no_number(ranks: int) -> None:
    """But for the counts of an exchange, once: rows of a sharded table, and a layer's tokens for experts elsewhere.

    A pipeline reads the number of the micro-batch, which lies on the CPU. Modes do not see what a backward asks for.
    """

    def on_rank(world: World) -> list[tuple[Counter[str], Counter[str]]]:
        found = []
        for case in CASES[ranks]:
            mesh = mesh_of(case.layout)
            parallel = build_parallel_model(case.config, mesh, CPU, initial_values(0), sequence_length=case.length)
            engine = Engine(parallel, CrossEntropy(), CPU)
            arrived = [engine.local(batch, False, False) for batch in share_of(case, 0, case.layout, world.rank)]
            engine.local = lambda batch, vision, audio: batch  # type: ignore[method-assign]
            engine.forward_backward(arrived, 1)  # what happens once, such as making a schedule
            with Waits() as waits:
                engine.forward_backward(arrived, 1)
            tables = sum(isinstance(part, ShardedRows) for part in parallel.model.modules())
            layers = sum(isinstance(m, ParallelExperts) and m.group.size() > 1 for m in parallel.model.modules())
            found.append((waits.found, Counter(tolist=len(arrived) * (tables + layers))))
        return found

    for case, *everywhere in zip(CASES[ranks], *run_ranks(ranks, on_rank), strict=True):
        found: Counter[str] = sum((asked for asked, _ in everywhere), Counter())
        report("Numbers asked for in a step", {"variant": case.variant, "mesh": case.layout, "asked": dict(found)})
        for asked, expected in everywhere:
            if case.layout.pp > 1:
                del asked["__int__"]
            assert asked == expected, (case, asked)
