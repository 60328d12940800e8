"""Write a checkpoint of a run as a folder that transformers and vLLM open.

    python -m launch.export run=runs/default out=my-gemma
    python -m launch.export run=runs/default out=my-gemma checkpoint=step_00000400 dtype=float32
    torchrun --nproc 8 launch/export.py run=runs/big out=my-gemma     # eight processes write eight files at a time

out must not exist. The newest whole checkpoint is taken unless `checkpoint` names another. dtype
is auto (each tensor as in the weights the run began with, else bfloat16), bfloat16 or float32.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[:] = [str(Path(__file__).resolve().parent.parent), *sys.path[1:]]

import torch
import torch.distributed as dist

from launch.arguments import run
from model import Gemma4Config, UserError
from parallel.world import World, init_process_group
from train.checkpoint import Checkpointer, read_state
from train.config import EXPORT_DTYPES
from train.export import export
from train.origin import check_origin


@dataclass
class Options:
    """Arguments of `gemwright export`."""

    run: str
    out: str
    checkpoint: str | None = None
    dtype: str = field(default="auto", metadata={"choices": EXPORT_DTYPES})


def export_run(options: Options) -> None:
    """Write a run's checkpoint as a folder that transformers opens. Raises `UserError`."""
    folder = Path(options.run)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"run={folder} holds no checkpoints; give the run.dir of a training run.")
    init_process_group(World.from_environment(), torch.device("cpu"))
    checkpointer = Checkpointer(folder / "checkpoints", keep=1, asynchronous=False, writing=False)
    if options.checkpoint is None:
        checkpoint = checkpointer.newest()
    else:
        checkpoint = checkpointer.verified(folder / "checkpoints" / options.checkpoint)
    if checkpoint is None:
        raise UserError(f"run={folder} holds no whole checkpoint yet; wait for one.")
    state = read_state(checkpoint)
    tokenizer, origin = folder / "tokenizer.json", folder / "origin"
    check_origin(state, origin, options.dtype)
    export(
        checkpoint,
        Path(options.out),
        Gemma4Config.from_dict(state["model"]),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        origin=origin if origin.is_dir() else None,
        dtype=options.dtype,
    )
    if dist.get_rank() == 0:
        print(f"{checkpoint.name} of {folder}, {state['tokens_seen']:,} tokens seen, is in {options.out}")
    dist.destroy_process_group()


def main() -> None:
    """Export what the command line names, with two threads a process unless the environment says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    run(Options, export_run, __doc__)


if __name__ == "__main__":
    main()
