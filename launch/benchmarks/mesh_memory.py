"""Host memory a rank takes in a step, on one rank and on four: `python -m launch.benchmarks.compare memory`.

Context parallel at 16,384 positions, the loss split by vocabulary, and the per-layer table split by rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data.batch import Batch
from launch.arguments import run
from launch.torchrun import start
from model import Gemma4Config
from model.head import Head
from model.init import random_fill
from parallel.agree import from_all
from parallel.apply import build_parallel_model
from parallel.dtensors import local_part
from parallel.embedding_shards import ShardedRows
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.options import ActivationCheckpointConfig, PlanConfig
from parallel.tensor.tokens import TensorParallel
from parallel.tensor.vocabulary import VocabParallelEmbedding, VocabParallelHead
from parallel.world import World, init_process_group
from train.engine import Engine
from train.objective import CrossEntropy

CPU = torch.device("cpu")
RANKS = 4
LENGTH, VOCAB, WIDTH, TOKENS, TABLE = 16_384, 262_144, 256, 2048, 2048
_MIB = 1 << 20
RECOMPUTED = PlanConfig(activation_checkpoint=ActivationCheckpointConfig(mode="full"))


def context(size: int) -> Callable[[], object]:
    """One forward and backward of tiny 31B over one sequence."""
    config = Gemma4Config.from_name("tiny_31b", vision=None, vocab_size=512, max_position_embeddings=LENGTH)
    mesh = build_mesh(CPU, Layout(cp=size))
    parallel = build_parallel_model(config, mesh, CPU, random_fill(0, 0.02, 0), RECOMPUTED)
    engine = Engine(parallel, CrossEntropy(), CPU)
    tokens = torch.randint(3, 500, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = Batch.make(config, tokens, tokens, torch.arange(LENGTH)[None], torch.zeros_like(tokens))
    return lambda: engine.forward_backward([batch], LENGTH)


def loss(size: int) -> Callable[[], object]:
    """Loss and gradients of 2,048 tokens over 262,144 pieces."""
    plan = TensorParallel(build_mesh(CPU, Layout(tp=size)).tp, True)
    with torch.device("meta"):
        whole = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
    table = VocabParallelEmbedding(whole, plan)
    table.to_empty(device="cpu")
    local_part(table.weight).detach().normal_(0, 0.02)
    hidden, labels = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(VOCAB, (TOKENS,))
    head = VocabParallelHead(30.0, plan) if size > 1 else Head(30.0)
    weight = table.weight if size > 1 else nn.Parameter(local_part(table.weight).detach())
    return lambda: head(hidden, weight, labels).total.backward()


def rows(size: int) -> Callable[[], object]:
    """Building a per-layer table of 262,144 rows of 2,048, and one look-up with its backward."""

    def step() -> None:
        with torch.device("meta"):
            whole = nn.Embedding(VOCAB, TABLE)
        mesh = build_mesh(CPU, Layout(dp_shard=size))
        table = ShardedRows(whole, mesh.fsdp(mesh.whole), torch.float32)
        table.to_empty(device="cpu")
        local_part(table.weight).detach().fill_(0.5)
        table(torch.randint(1, VOCAB, (TOKENS,))).sum().backward()

    return step


KINDS = {"context": context, "loss": loss, "rows": rows}


@dataclass
class Arguments:
    kind: str


def measure(arguments: Arguments) -> None:
    world = World.from_environment()
    init_process_group(world, CPU)
    step = KINDS[arguments.kind](world.size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    step()
    found = from_all(_peak() - before)
    if world.rank == 0:
        print(f"{arguments.kind}: {world.size} ranks, at most {max(found) / _MIB:,.0f} MiB a rank", flush=True)
    dist.destroy_process_group()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def memory() -> None:
    for kind in KINDS:
        print(KINDS[kind].__doc__, flush=True)
        for size in (1, RANKS):
            start("launch.benchmarks.mesh_memory", size, f"kind={kind}")


if __name__ == "__main__":
    run(Arguments, measure, __doc__)
