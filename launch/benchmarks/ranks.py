"""A training step on two processes beside that of `transformers` 5.24 or newer, by its own FSDP2 and tensor parallel.

python -m launch.benchmarks.ranks                                    # every shape, both ways to share the work
python -m launch.benchmarks.ranks shapes=dense meshes=tp json=ranks.json

fsdp: each process has a sequence, parameters are sharded. tp: both have one sequence, and each half of every matrix.
Rounds, times and memory are counted as in `launch.benchmarks.step`, memory as the sum of both processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data.batch
from launch.arguments import run
from launch.benchmarks.shapes import SHAPES, Batch, batch
from launch.benchmarks.step import Step, asked, drawn_model, matrix_speed, measure, reference, shifted_labels, status
from model import Gemma4Config, UserError
from model.init import Slice, initialised_tensors
from parallel.apply import build_parallel_model
from parallel.dtensors import local_part
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.world import prepare_allocators
from train.engine import Engine
from train.objective import CrossEntropy

CPU, RANKS = torch.device("cpu"), 2
MESHES = {"fsdp": Layout(dp_shard=RANKS), "tp": Layout(tp=RANKS)}


def ours(config: Gemma4Config, given: Batch, mesh: str) -> tuple[nn.Module, Step]:
    """This project's step on a rank."""
    values = dict(initialised_tensors(drawn_model(config)))

    def fill(slices: list[Slice]) -> None:
        for part in slices:
            at = tuple(slice(o, o + size) for o, size in zip(part.offset, part.local.shape, strict=True))
            part.local.detach().copy_(values[part.name].detach()[at])

    layout = MESHES[mesh]
    parallel = build_parallel_model(config, build_mesh(CPU, layout), CPU, fill, sequence_length=given.tokens.shape[1])
    values.clear()
    engine = Engine(parallel, CrossEntropy(), CPU)
    labels = given.tokens.roll(-1, 1).masked_fill(~given.keep, data.batch.IGNORE)
    row = data.batch.Batch.make(config, given.tokens, labels, given.positions, given.documents)
    units = row.kept.count * layout.dp

    def step() -> Tensor:
        sums = engine.forward_backward([row], units)
        assert sums is not None
        total = sums["loss"].double()
        dist.all_reduce(total)
        return total / units

    return parallel.whole, step


def transformers(config: Gemma4Config, given: Batch, mesh: str, folder: str) -> tuple[nn.Module, Step]:
    """The step of `transformers` on a rank, by its own plans."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        cast(Any, reference(config)).save_pretrained(folder)
    dist.barrier()
    sizes: dict[str, Any] = {f"{mesh}_size": RANKS}
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = cast(Any, AutoModelForCausalLM).from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), **options
    )
    model.train()
    labels = shifted_labels(given)

    def step() -> Tensor:
        loss = model(input_ids=given.tokens, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return model, step


def _rank(
    rank: int, port: int, name: str, config: Gemma4Config, given: Batch, mesh: str, folder: str, pipe: Any
) -> None:
    """A process of a library: a step for every word from the pipe."""
    if name == "ours":
        prepare_allocators()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(RANKS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        model, step = ours(config, given, mesh) if name == "ours" else transformers(config, given, mesh, folder)
        step()
    except Exception as error:  # on all ranks alike, or the others wait for this one until the benchmark ends
        while asked(pipe):
            pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    model.zero_grad()
    gradients = sum(local_part(p).nbytes for p in model.parameters() if p.requires_grad)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    while asked(pipe):
        dist.barrier()
        speed = matrix_speed()
        dist.barrier()
        start = time.perf_counter()
        loss = step().item()
        dist.barrier()
        seconds = time.perf_counter() - start
        model.zero_grad()
        pipe.send((seconds, loss, status("VmHWM") - before - gradients, max(speed, matrix_speed())))
    dist.destroy_process_group()


def serve(mesh: str, name: str, config: Gemma4Config, given: Batch, pipe: Any) -> None:
    """A library's process, which has its ranks as children and speaks for both."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="gemwright-ranks-") as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        pipes = [context.Pipe() for _ in range(RANKS)]
        ranks = [
            context.Process(target=_rank, args=(rank, port, name, config, given, mesh, folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        for _, theirs in pipes:
            theirs.close()
        while asked(pipe):
            for own, _ in pipes:
                own.send(True)
            found = [own.recv() for own, _ in pipes]
            if isinstance(found[0], str):
                pipe.send(found[0])
                continue
            seconds, losses, peaks, speeds = zip(*found, strict=True)
            pipe.send((max(seconds), losses[0], sum(peaks), sum(speeds)))
        for own, _ in pipes:
            own.send(False)
        for rank in ranks:
            rank.join(5)
            rank.kill()


@dataclass
class Options:
    """Arguments of the benchmark."""

    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"choices": tuple(SHAPES)})
    meshes: list[str] = field(default_factory=lambda: list(MESHES), metadata={"choices": tuple(MESHES)})
    length: int = 1024
    rounds: int = 3
    json: str | None = None


def benchmark(options: Options) -> None:
    """Print a line for each shape and mesh. Raises `UserError` where `transformers` has no such plans."""
    try:
        import transformers.distributed.fsdp  # noqa: F401
    except ImportError:
        raise UserError("this needs transformers 5.24 or newer: pip install 'transformers>=5.24'.") from None
    lines = []
    print(f"float32, {RANKS} processes of one thread, medians of {options.rounds}; memory above weights and gradients")
    print("  shape  mesh  its s  our s  tokens/s  its GiB  our GiB  memory  loss differs")
    for shape in options.shapes:
        for mesh in options.meshes:
            given = batch(SHAPES[shape], options.length, 1.0)
            try:
                us, them = measure(("ours", "transformers"), SHAPES[shape], given, options.rounds, partial(serve, mesh))
            except UserError as error:
                print(f"{shape:>7} {mesh:>5} {error}", flush=True)
                continue
            lines.append(
                {
                    "shape": shape,
                    "mesh": mesh,
                    "their_seconds": them.seconds,
                    "our_seconds": us.seconds,
                    "their_peak_bytes": them.peak,
                    "our_peak_bytes": us.peak,
                    "loss_difference": abs(us.loss / them.loss - 1),
                }
            )
            print(
                f"{shape:>7} {mesh:>5} {them.seconds:>6.2f} {us.seconds:>6.2f} {them.seconds / us.seconds:>8.2f}x "
                f"{them.peak / 2**30:>8.2f} {us.peak / 2**30:>8.2f} {us.peak / them.peak:>6.2f}x "
                f"{abs(us.loss / them.loss - 1):>13.1e}",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    run(Options, benchmark, __doc__)
