"""The memory of a run before it is started: what a rank holds, and at which moment of a step it holds most.

python -m launch.memory                              # every released variant at its recipe, and its smallest machine
python -m launch.memory 8 +variant=31b parallel.tp=4 # a number of ranks, then what follows train/main.py

Counted for GPUs of 80 GB (`gb=80` as the first word says another size), in bfloat16 unless run.dtype says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from launch.variants import table
from model import ConfigError, UserError
from model.variants import HUB_IDS
from parallel.world import compute_dtype
from train.footprint import GB, Step, capacity, footprint_of, smallest_sharding, step_of
from train.load_config import load_config
from train.resolve import Resolved, resolve


def _run(ranks: int, words: list[str]) -> tuple[Resolved, torch.dtype]:
    run = resolve(load_config(words), ranks)
    return run, compute_dtype(run.config.run.dtype, torch.device("cuda"))


def one(ranks: int, words: list[str], gigabytes: float) -> Iterator[str]:
    """Lines on one run."""
    run, dtype = _run(ranks, words)
    found = footprint_of(run, dtype, "cuda")
    step = step_of(run, dtype, "cuda")
    yield (
        f"{run.config.model.name} on {ranks} ranks: {run.layout} | {step.micro_batch_size} x {step.sequence_length} "
        f"positions at once, activation checkpoint {run.config.activation_checkpoint.mode}, compute "
        f"{str(dtype).removeprefix('torch.')}"
    )
    yield from found.lines()
    card = gigabytes * 2**30  # as an H100 80 GB has them
    room = capacity(card)
    verdict = "fits" if found.peak <= room else "does not fit"
    yield (f"{verdict} a card of {gigabytes:g} GB, of whose {card / GB:.1f} tensors may take {room / GB:.1f}")
    if found.peak > room:
        yield _advice(run, step, room)


def _advice(run: Resolved, step: Step, room: float) -> str:
    smallest = smallest_sharding(run, step, room)
    if smallest is None:
        return "no number of ranks is enough; lower data.sequence_length, or set parallel.tp or parallel.cp"
    layout, _ = smallest
    return (
        f"it fits {layout.world_size} ranks ({layout}); with as many as here, try parallel.tp, or parallel.cpu_offload"
    )


def recipes(gigabytes: float) -> Iterator[dict[str, str]]:
    """A row for each released variant: its recipe on 8 cards, the fewest that it fits, and what fits it on one."""
    room = capacity(gigabytes * 2**30)
    for name in HUB_IDS:
        variant = name.removeprefix("gemma4_")
        run, dtype = _run(8, [f"+variant={variant}"])
        step = step_of(run, dtype, "cuda")
        found = footprint_of(run, dtype, "cuda")
        smallest = smallest_sharding(run, step, room)
        yield {
            "variant": variant,
            "8 cards": str(run.layout),
            "GB a card": f"{found.peak / GB:.1f}",
            "most in the": found.narrowest,
            "fewest cards": "more than 1,024" if smallest is None else str(smallest[0].world_size),
            "one card": _on_one_card(variant, room),
        }


def _on_one_card(variant: str, room: float) -> str:
    """The least that has to be changed for one card, and what is then taken."""
    narrow = "optimizer.state_dtype=float8"
    for words in ([], [narrow], [narrow, "model.per_layer_table=freeze"], ["parallel.cpu_offload=true"]):
        try:
            run, dtype = _run(1, [f"+variant={variant}", "parallel.tp=1", "parallel.ep=1", *words])
        except ConfigError:  # it has no such table
            continue
        found = footprint_of(run, dtype, "cuda")
        if found.peak <= room:
            on_host = f" and {found.on_host / GB:.0f} GB of the host" if found.on_host else ""
            return f"`{' '.join(words)}`: {found.peak / GB:.1f} GB{on_host}"
    return "none"


def main() -> None:
    """Print the memory of the run that the command line describes, or of every recipe."""
    words = sys.argv[1:]
    if {"-h", "--help"}.intersection(words):
        print(__doc__)
        return
    try:
        gigabytes = 80.0
        if words and words[0].startswith("gb="):
            gigabytes = float(words.pop(0).removeprefix("gb="))
        if not words:
            print(table([*recipes(gigabytes)]))
            return
        if not words[0].isdigit() or int(words[0]) < 1:
            raise ConfigError(f"{words[0]} is no number of ranks; it goes first, as in: memory 8 +variant=31b.")
        for line in one(int(words[0]), words[1:], gigabytes):
            print(line)
    except UserError as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        sys.exit(f"error: gb= takes a number ({error}).")


if __name__ == "__main__":
    main()
