"""Host memory of a rank, measured for `gemwright benchmark memory` and `load`.

memory: what a step takes on one rank and on four: context parallel at 16,384 positions, the loss split by
vocabulary, and the per-layer table split by rows. load: writes three layers of 26B-A4B (6.4 GB in bfloat16),
loads them on two ranks into float32 masters, and reports each rank's peak beyond the slices it keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from data.batch import Batch
from launch.arguments import run
from model import Gemma4, Gemma4Config
from model.head import Head
from model.hf.weights import INDEX, Weights, disk_key
from model.init import initialised_tensors, random_fill
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
RANKS, LOADING_RANKS = 4, 2
LENGTH, VOCAB, WIDTH, TOKENS, TABLE = 16_384, 262_144, 256, 2048, 2048
_MIB, _GB = 1 << 20, 10**9


def context(size: int) -> Callable[[], object]:
    """One forward and backward of tiny 31B over one sequence."""
    config = Gemma4Config.from_name("tiny_31b", vision=None, vocab_size=512, max_position_embeddings=LENGTH)
    mesh = build_mesh(CPU, Layout(cp=size))
    recomputed = PlanConfig(activation_checkpoint=ActivationCheckpointConfig(mode="full"))
    parallel = build_parallel_model(config, mesh, CPU, random_fill(0, 0.02, 0), recomputed)
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


STEPS = {"context": context, "loss": loss, "rows": rows}


def step_memory(kind: str, world: World) -> None:
    """Print the most that a step adds on any rank."""
    step = STEPS[kind](world.size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    step()
    found = from_all(_peak() - before)
    if world.rank == 0:
        print(f"{kind}: {world.size} ranks, at most {max(found) / _MIB:,.0f} MiB a rank", flush=True)


def write_checkpoint(folder: Path) -> int:
    """Random bfloat16 weights, one file for each layer and one for the rest; bytes written."""
    config = Gemma4Config.from_name("gemma4_26b_a4b").replace(num_hidden_layers=3, vision=None)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    with torch.device("meta"):
        tensors = initialised_tensors(Gemma4(config))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[disk_key(name, text_only=True)] = tensor
    for file, metas in files.items():
        save_file(
            {key: torch.randn(1).bfloat16().expand(meta.shape).contiguous() for key, meta in metas.items()},
            folder / file,
        )
    index = {"weight_map": {key: file for file, metas in files.items() for key in metas}}
    (folder / INDEX).write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_memory(folder: Path, world: World) -> None:
    """Print what loading adds on each rank to the peak of before."""
    mesh = build_mesh(CPU, Layout(dp_shard=world.size))
    config = Gemma4Config.from_hf(folder)
    before = _peak()
    model = build_parallel_model(config, mesh, CPU, Weights(folder, config).fill).model
    grown = _peak() - before
    found = from_all((grown, sum(local_part(tensor).nbytes for _, tensor in initialised_tensors(model))))
    if world.rank == 0:
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        for rank, (peak, own) in enumerate(found):
            print(
                f"rank {rank}: peak {peak / _GB:.2f} GB, of it its own slices {own / _GB:.2f} GB; "
                f"beyond them {(peak - own) / _GB:.2f} GB (largest file {largest / _GB:.2f} GB)"
            )


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@dataclass
class Arguments:
    """What a process started by this module measures: a kind of step, or loading a checkpoint."""

    step: str = ""
    load: str = ""
    """A checkpoint's folder."""


def measure(arguments: Arguments) -> None:
    """One measurement, on each rank of it."""
    world = World.from_environment()
    init_process_group(world, CPU)
    if arguments.load:
        load_memory(Path(arguments.load), world)
    else:
        step_memory(arguments.step, world)
    dist.destroy_process_group()


def _start(ranks: int, argument: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", __name__, argument]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def memory() -> None:
    """Print the peak of each kind of step, on one rank and on several."""
    for kind, step in STEPS.items():
        print(step.__doc__, flush=True)
        for size in (1, RANKS):
            _start(size, f"step={kind}")


def load() -> None:
    """Print how loading a large checkpoint raises the peak of each rank."""
    with tempfile.TemporaryDirectory(prefix="gemwright-load-") as name:
        written = write_checkpoint(Path(name))
        print(f"loading {written / _GB:.1f} GB of bfloat16 on {LOADING_RANKS} ranks into float32 masters", flush=True)
        _start(LOADING_RANKS, f"load={name}")


if __name__ == "__main__":
    run(Arguments, measure, __doc__)
