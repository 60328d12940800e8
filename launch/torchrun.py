"""torch's `torchrun`, with the spelling `--nproc N` that torch's own parser calls ambiguous.

    torchrun --nproc 8 train/main.py +variant=31b
    torchrun --nnodes 2 --nproc-per-node 8 ... train/main.py

Everything else is torch's. When a worker fails it has said why itself; the launcher adds a
line only when a signal killed it, in place of torch's report.
"""

from __future__ import annotations

import argparse
import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = get_args_parser()
    parser.add_argument("--nproc", dest="nproc_per_node", type=str, default=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    # The agent logs each dead worker as an error of its own; the workers' words and ours suffice.
    for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run(parse(sys.argv[1:]))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"error: rank {rank} was killed by {failure.signal_name()}; the others were stopped.",
                file=sys.stderr,
            )
            sys.exit(1)
        sys.exit(failure.exitcode)


if __name__ == "__main__":
    main()
