"""torch's `torchrun`, with the spelling `--nproc N` that torch's own parser calls ambiguous.

    torchrun --nproc 8 train/main.py +variant=31b
    torchrun --nnodes 2 --nproc-per-node 8 ... train/main.py

Everything else is torch's. A worker that fails says why itself; the launcher adds a line only
when a signal killed it, in place of torch's report.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

_HANDED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals that the launcher hands on to its workers before it ends; SLURM warns of a time limit by the last."""
_SHUTDOWN_SECONDS = 90  # what workers get, told to stop, to write a checkpoint; torch gives 30


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of torch's launcher, with `--nproc` too, and time for a last checkpoint when stopped."""
    parser = get_args_parser()
    parser.set_defaults(shutdown_timeout=_SHUTDOWN_SECONDS, signals_to_handle=handed_on())
    parser.add_argument("--nproc", dest="nproc_per_node", type=str, default=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def handed_on() -> str:
    """The signals to hand on, but for those that whoever started the launcher has it ignore.

    launch/slurm/train.sbatch does so: there a signal reaches every process by itself, and a launcher that ended by it
    would end the other nodes while they save.
    """
    return ",".join(name for name in _HANDED_ON if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN)


def usable_processors() -> int:
    """Processors that this process may run on, or all of the machine where the system does not tell."""
    allowed = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def with_script(arguments: list[str], script: str) -> list[str]:
    """The arguments with `script` put in where the launcher's own options end."""
    own = parse([*arguments, script]).training_script_args
    end = len(arguments) - len(own)
    return [*arguments[:end], script, *arguments[end:]]


def main() -> None:
    """Start the processes of the command line, with the CPU's threads shared out among them."""
    # The agent logs each dead worker as an error of its own; the workers' words and ours suffice.
    for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    arguments = parse(sys.argv[1:])
    if arguments.nproc_per_node.isdigit():  # torch would give each process one thread
        threads = max(1, usable_processors() // int(arguments.nproc_per_node))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        run(arguments)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        # A rank that dies takes others with it, and SIGTERM is the agent's own: the first other signal is the cause.
        killed = {r: f for r, f in error.failures.items() if f.exitcode < 0 and f.signal_name() != "SIGTERM"}
        for rank, failure in killed.items():
            print(f"error: rank {rank} was killed by {failure.signal_name()}; all were stopped.", file=sys.stderr)
        sys.exit(next((f.exitcode for f in error.failures.values() if f.exitcode > 0), 1))


if __name__ == "__main__":
    main()
