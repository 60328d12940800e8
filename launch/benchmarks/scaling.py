"""How memory, operations and time of a step grow with length, layers, experts and ranks: counted, and measured here.

python -m launch.benchmarks.scaling                      # all of it, some ten minutes
python -m launch.benchmarks.scaling length layers json=scaling.json

length    512 to 16,384 positions, through a sliding and through a full layer
layers    6 to 48 layers, recomputed
recompute 24 layers, nothing, selected operations, every n-th layer or all of them recomputed
experts   8 to 128 experts, 8 of them active
context   65,536 positions over 4 and over 8 ranks of context parallel, the loss of both
released  262,144 positions of every released variant, counted only

Bytes are those that a step takes above weights and gradients, on one rank: `train/footprint.py` counts them, and
torch's allocator says them of a real step. Operations are those of `train/flops.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from data.batch import Batch
from launch.arguments import run
from launch.variants import table
from model import Gemma4, Gemma4Config, UserError
from model.init import random_fill
from model.variants import HUB_IDS
from parallel.agree import from_all
from parallel.apply import build_parallel_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.options import ActivationCheckpointConfig, PlanConfig
from parallel.world import World, init_process_group
from train.engine import Engine
from train.flops import training_flops
from train.footprint import GB, Step, capacity, footprint, footprint_of
from train.load_config import load_config
from train.objective import CrossEntropy
from train.resolve import resolve

Row = dict[str, str]
CPU = torch.device("cpu")
MB = 10**6
LONG, RANKS = 65_536, (4, 8)


def decoder(**sizes: Any) -> Gemma4Config:
    """A small decoder whose layers, not its head, are what a step takes."""
    small: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 64,
        "sliding_window": 512,
        "num_hidden_layers": 2,
        "max_position_embeddings": LONG,
    }
    return Gemma4Config(**(small | sizes))


def length() -> Iterator[Row]:
    """What one more layer adds, sliding with a window of 512 or full, over ever longer sequences."""
    for positions in (512, 1024, 2048, 4096, 8192, 16_384):
        (alone, two, mixed) = (
            measured(decoder(num_hidden_layers=count, sliding_window_pattern=pattern), positions)
            for count, pattern in ((1, 1), (2, 1), (2, 2))
        )
        row = {"positions": f"{positions:,}"}
        for name in alone:
            for kind, found in (("sliding", mixed), ("full", two)):
                row[f"{name}, {kind}"] = f"{found[name] - alone[name]:.2f}"
        yield row


def layers() -> Iterator[Row]:
    """Ever more layers, of which the backward keeps only the inputs."""
    for count in (6, 12, 24, 48):
        yield {"layers": str(count), **told(measured(decoder(num_hidden_layers=count), 1024, "full"))}


def recompute() -> Iterator[Row]:
    """What recomputation saves and costs, in 24 layers."""
    for mode, every in (("none", 1), ("full", 4), ("full", 2), ("selective", 1), ("full", 1)):
        found = measured(decoder(num_hidden_layers=24), 1024, mode, every)
        yield {"recomputed": mode if every == 1 else f"{mode}, every {every}", **told(found)}


def experts() -> Iterator[Row]:
    """Ever more experts, of which a token has eight."""
    for count in (8, 16, 32, 64, 128):
        sizes = {"enable_moe_block": True, "num_experts": count, "top_k_experts": 8, "moe_intermediate_size": 128}
        config = decoder(**sizes)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Gemma4(config).parameters())
        yield {"experts": str(count), "parameters": f"{parameters / 1e6:.1f} M", **told(measured(config, 2048))}


def told(found: dict[str, float]) -> Row:
    """Numbers as they are read."""
    return {name: f"{value:.2f}" if value < 10 else f"{value:.0f}" for name, value in found.items()}


def measured(config: Gemma4Config, positions: int, recomputed: str = "none", every: int = 1) -> dict[str, float]:
    """Operations, seconds and bytes of a step over one sequence."""
    plans = PlanConfig(activation_checkpoint=ActivationCheckpointConfig(recomputed, every))
    mesh = build_mesh(CPU, Layout())
    engine = Engine(build_parallel_model(config, mesh, CPU, random_fill(0, 0.02, 0), plans), CrossEntropy(), CPU)
    batch = one_sequence(config, positions)
    operations = training_flops(config, batch.inputs)

    def step() -> float:
        start = time.perf_counter()
        engine.forward_backward([batch], positions)
        return time.perf_counter() - start

    step()  # gradients are there from here on
    seconds = min(step() for _ in range(3))
    counted = footprint(config, Layout(), plans, Step(1, positions, 1, torch.float32, "cpu", "every"))
    on_top = sum(counted.moments[counted.narrowest].values())
    return {
        "Gflop": operations / 1e9,
        "seconds": seconds,
        "MB counted": on_top / MB,
        "MB measured": peak(step) / MB,
    }


def peak(step: Callable[[], object]) -> int:
    """The most bytes of tensors that a step adds, by what torch's allocator says of each."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def one_sequence(config: Gemma4Config, positions: int) -> Batch:
    """One document, all of it supervised."""
    tokens = torch.randint(3, config.vocab_size, (1, positions), generator=torch.Generator().manual_seed(0))
    return Batch.make(config, tokens, tokens, torch.arange(positions)[None], torch.zeros_like(tokens))


def context() -> Iterator[Row]:
    """A long sequence over some ranks, and over twice as many."""
    for ranks in RANKS:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", __spec__.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        said = subprocess.run([*command, "rank"], check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
        yield json.loads(said.splitlines()[-1])


def _on_rank() -> None:
    """One step over the long sequence, on each rank; rank 0 prints the row."""
    world = World.from_environment()
    init_process_group(world, CPU)
    config = Gemma4Config.from_name(
        "tiny_31b", vision=None, vocab_size=512, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=6,
        num_global_key_value_heads=1, max_position_embeddings=LONG,
    )  # fmt: skip
    plans = PlanConfig(activation_checkpoint=ActivationCheckpointConfig(mode="full"))
    mesh = build_mesh(CPU, Layout(cp=world.size))
    parallel = build_parallel_model(config, mesh, CPU, random_fill(0, 0.02, 0), plans, sequence_length=LONG)
    engine = Engine(parallel, CrossEntropy(), CPU, "every")
    batch = one_sequence(config, LONG)
    found: dict[str, Any] = {}

    def step() -> None:
        start = time.perf_counter()
        sums = engine.forward_backward([batch], LONG)
        found.update(seconds=time.perf_counter() - start, sums=sums)

    most = max(from_all(peak(step)))
    total = found["sums"]["loss"].double()
    dist.all_reduce(total)
    norm = engine.clip(1e9)
    if world.rank == 0:
        row = {
            "positions": f"{LONG:,}",
            "ranks": str(world.size),
            "loss": f"{float(total) / LONG:.9f}",
            "gradient norm": f"{norm:.9f}",
            "MB a rank": f"{most / MB:.0f}",
            "seconds, on the cores here": f"{found['seconds']:.0f}",
        }
        print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def released() -> Iterator[Row]:
    """The longest sequence of Gemma 4 on 64 cards of 80 GB: the fewest ranks of a sequence that each variant fits."""
    positions, room = 262_144, capacity(80 * 2**30)
    longer = f"model.max_position_embeddings={positions}"  # than e2b and e4b were released for
    for name in HUB_IDS:
        variant = name.removeprefix("gemma4_")
        if variant.endswith("_it"):
            continue
        row = {"variant": variant, "positions": f"{positions:,}", "cards": "64"}
        for cp in (8, 16, 32, 64):
            words = [f"+variant={variant}", f"data.sequence_length={positions}", f"parallel.cp={cp}", longer]
            more = ("parallel.tp=1", "parallel.ep=1", "train.global_batch_size=64")
            asked = resolve(load_config([*words, *more]), 64)
            asked = replace(asked, micro_batch_size=1)
            found = footprint_of(asked, torch.bfloat16, "cuda")
            row[f"GB at cp {cp}"] = f"{found.peak / GB:.0f}{'' if found.peak <= room else ' (too much)'}"
        yield row


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    part.__name__: part for part in (length, layers, recompute, experts, context, released)
}


@dataclass
class Arguments:
    """What is measured, in this order; all of it by default."""

    parts: list[str] = field(default_factory=list, metadata={"choices": (*PARTS, "rank")})
    json: str = ""
    """A file for the rows."""


def measure(arguments: Arguments) -> None:
    """Print a table for each part."""
    if arguments.parts == ["rank"]:
        _on_rank()
        return
    if "rank" in arguments.parts:
        raise UserError(f"rank is what a process of context runs; legal: {', '.join(PARTS)}.")
    init_process_group(World.from_environment(), CPU)
    found: dict[str, list[Row]] = {}
    for name in arguments.parts or PARTS:
        print(f"{name}: {PARTS[name].__doc__}", flush=True)
        found[name] = [*PARTS[name]()]
        print(table(found[name]) + "\n", flush=True)
    dist.destroy_process_group()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(Arguments, measure, __doc__, words="parts")
