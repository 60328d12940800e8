"""Train Gemma 4.

    python train/main.py                                          # a tiny model on this machine
    torchrun --nproc 8 train/main.py +variant=31b                 # a released size on eight GPUs
    torchrun --nproc 2 train/main.py +variant=tiny_31b train.steps=50 optimizer.lr=1e-3
    gemwright train --nproc 8 +variant=31b                        # installed, from any folder
    python train/main.py -m +variant=tiny_e4b optimizer.lr=1e-3,3e-3    # two runs, one after the other

Any key of train/config.py may follow as KEY=VALUE, a choice of configs/ as +GROUP=NAME (+recipe=sft), a file of keys as
--config mine.yaml, and a choice of your own as --config-dir FOLDER +experiment=mine; --cfg job prints what they give.
The run folder (run.dir) gets config.yaml, metrics.jsonl, samples.jsonl, loss.png and checkpoints/; the same command
goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages beside train/ come first, train/ itself is none
    sys.path[:] = [str(Path(__file__).resolve().parent.parent), *sys.path[1:]]
if __name__ == "__main__":  # here, since an import below would break on somebody else's package
    from train.own_packages import require_own_packages

    require_own_packages()

import logging
import os
import signal
import time
import traceback
from typing import NoReturn

import torch
import torch.distributed as dist

from model import UserError
from parallel.torch_private import default_store
from parallel.world import World, init_process_group, is_lost_rank, prepare_allocators, select_device
from train.load_config import load_config, printed
from train.overrides import without_print
from train.resolve import resolve
from train.sweep import is_sweep, sweep, words_of_task
from train.watch import ERROR

_LESS_MEMORY = (
    "lower train.micro_batch_size, data.sequence_length or data.workers, set "
    "activation_checkpoint.mode=full, or take more ranks: the run goes on from its last checkpoint."
)
# How long a rank that found the same mistake as rank 0 waits for rank 0's words before it leaves.
_COURTESY_SECONDS = 10


def _leave(world: World, message: str) -> NoReturn:
    """Exit 1; the first rank to come here prints the line, and the others print nothing.

    Other ranks wait in a collective, so an orderly exit would wait for them.
    """
    try:
        first = default_store().add(ERROR, 1) == 1
    except (RuntimeError, ValueError):  # no process group yet, or the rank that kept its store is gone
        first = True
    if first:
        where = f" (rank {world.rank})" if world.rank else ""
        print(f"error{where}: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _set_up(world: World) -> None:
    """Memory and the console: what rank 0 says, errors of the others, nothing of the libraries below an error."""
    prepare_allocators()
    logging.raiseExceptions = False  # who closes the pipe that reads this, or fills its disk, stops no run
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stdout)
    logging.getLogger("gemwright").setLevel(logging.INFO if world.rank == 0 else logging.ERROR)


def _instead_of_a_run(words: list[str]) -> int | None:
    """The exit status after a sweep, whose runs are processes of their own, or `--cfg job`; None if a run is wanted."""
    if is_sweep(words) and "RANK" not in os.environ:
        return sweep(words, [sys.executable, str(Path(__file__).resolve())])
    if without_print(words) != words:
        print(printed(load_config(without_print(words))), end="")
        return 0
    return None


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; the exit status, after one line for a mistake of the user's."""
    overrides = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"}.intersection(overrides):
        print(__doc__)
        return 0
    try:
        world = World.from_environment()
        if (status := _instead_of_a_run(overrides)) is not None:
            return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    _set_up(world)
    try:
        config = load_config(words_of_task(overrides) if is_sweep(overrides) else overrides)
        device = select_device(config.run.device, world)
        run = resolve(config, world.size)
    except UserError as error:
        # Mostly every rank sees this one alike: rank 0 speaks, and the launcher then ends the others. One that
        # is still there after a while is alone with it, as with a folder only its own node lacks.
        if world.rank != 0:
            time.sleep(_COURTESY_SECONDS)
        where = f" (rank {world.rank})" if world.rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return 1

    from train.trainer import Trainer

    try:
        init_process_group(world, device)
        trainer = Trainer(run, world, device)
        trainer.train()
        trainer.watch.close()
    except UserError as error:
        _leave(world, str(error))
    except torch.OutOfMemoryError as error:
        _leave(
            world,
            f"out of GPU memory ({str(error).split('. ')[0]}); lower train.micro_batch_size or data.sequence_length, "
            "set activation_checkpoint.mode=full, or take more ranks.",
        )
    except MemoryError:
        _leave(world, f"out of memory; {_LESS_MEMORY}")
    except OSError as error:
        _leave(world, f"{error}; mend it and start again: the run goes on from its last checkpoint.")
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            _leave(world, f"out of memory; {_LESS_MEMORY}")
        if "DataLoader worker" in str(error):  # raised wherever the main thread was when it heard
            said = " ".join(str(error).split())[:120]
            _leave(world, f"a loader worker was killed ({said}), often for want of memory; {_LESS_MEMORY}")
        if not is_lost_rank(error):
            traceback.print_exc()
            os._exit(1)
        _leave(world, "lost another rank, whose own words or the launcher's say why.")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # Python's own shutdown would let a late one kill a finished run
        signal.signal(number, signal.SIG_IGN)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
