"""Where a pipeline is cut into stages, and what its schedules can run."""

from __future__ import annotations

from model.config import ConfigError, Gemma4Config
from model.costs import layer_costs

SCHEDULES = ("1f1b", "interleaved", "zero_bubble")


def num_stages(schedule: str, virtual: int, pp: int) -> int:
    """Stages of the whole pipeline: one on each rank, or several where the schedule interleaves them."""
    return pp if schedule == "1f1b" else pp * virtual


def check_pipeline(
    schedule: str, virtual: int, pp: int, num_layers: int, num_micro_batches: int, float8: str = "none"
) -> None:
    """Raises `ConfigError` for what a schedule cannot run, with the nearest that it can."""
    if schedule == "zero_bubble" and float8 != "none":
        raise ConfigError(
            f"parallel.pp_schedule=zero_bubble makes weight gradients apart, which products of float8.recipe={float8} "
            "cannot; nearest legal: parallel.pp_schedule=interleaved, or float8.recipe=none."
        )
    stages = num_stages(schedule, virtual, pp)
    if stages > num_layers:
        raise ConfigError(
            f"parallel.pp={pp} with pp_virtual={virtual} makes {stages} stages of {num_layers} layers; nearest legal: "
            + (f"parallel.pp_virtual={num_layers // pp}." if num_layers // pp > 1 else "parallel.pp_schedule=1f1b.")
        )
    if num_micro_batches < pp:
        raise ConfigError(
            f"parallel.pp={pp} needs at least {pp} micro-batches a step, but there are {num_micro_batches}; lower "
            f"train.micro_batch_size or raise train.global_batch_size until there are {pp}."
        )
    if schedule != "1f1b" and num_micro_batches % pp:
        raise ConfigError(
            f"parallel.pp_schedule={schedule} needs micro-batches in multiples of parallel.pp={pp}, but there are "
            f"{num_micro_batches}; nearest legal: {num_micro_batches // pp * pp}, or parallel.pp_schedule=1f1b."
        )


def token_costs(config: Gemma4Config, sequence_length: int) -> list[int]:
    """Multiply-adds for a token in each layer, with scores over half the keys in reach."""
    found = []
    for index in range(config.num_hidden_layers):
        window, costs = config.layer(index).window, layer_costs(config, index)
        reach = sequence_length // 2 if window is None else min(window, sequence_length // 2)
        found.append(costs.key + costs.query + reach * costs.pair)
    return found


def cut_layers(config: Gemma4Config, sequence_length: int, stages: int) -> list[range]:
    """The runs of layers that make the slowest stage fastest; the head counts to the last stage."""
    costs = token_costs(config, sequence_length)
    costs[-1] += config.hidden_size * config.vocab_size
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    count = len(costs)
    # best[k][end]: the slowest of k stages over the first `end` layers, and where the last of them starts
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for k in range(1, stages + 1):
        best.append(
            {
                end: min(
                    (max(slowest, total[end] - total[start]), -start)
                    for start, (slowest, _) in best[k - 1].items()
                    if start < end
                )
                for end in range(k, count - stages + k + 1)
            }
        )
    spans, end = [], count
    for k in range(stages, 0, -1):
        start = -best[k][end][1]
        spans.append(range(start, end))
        end = start
    return spans[::-1]
