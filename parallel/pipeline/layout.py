"""Where a pipeline is cut into stages, and what its schedules can run."""

from __future__ import annotations

from model.config import ConfigError, Gemma4Config

SCHEDULES = ("1f1b", "interleaved", "zero_bubble")


def num_stages(schedule: str, virtual: int, pp: int) -> int:
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


def layer_costs(config: Gemma4Config, sequence_length: int) -> list[int]:
    """Multiply-adds for a token in each layer: products, active experts, and scores over half the keys in reach."""
    D, N, P = config.hidden_size, config.num_attention_heads, config.hidden_size_per_layer_input
    costs = []
    for index in range(config.num_hidden_layers):
        layer = config.layer(index)
        cost = 2 * D * N * layer.head_dim + 3 * D * (layer.intermediate_size + P)
        if not layer.is_kv_consumer:
            cost += D * layer.num_kv_heads * layer.head_dim * (1 if layer.k_eq_v else 2)
        if config.enable_moe_block:
            assert config.num_experts and config.top_k_experts and config.moe_intermediate_size
            cost += D * config.num_experts + 3 * D * config.moe_intermediate_size * config.top_k_experts
        reach = sequence_length // 2 if layer.window is None else min(layer.window, sequence_length // 2)
        costs.append(cost + 2 * reach * N * layer.head_dim)
    return costs


def cut_layers(config: Gemma4Config, sequence_length: int, stages: int) -> list[range]:
    """The runs of layers that make the slowest stage fastest; the head counts to the last stage."""
    costs = layer_costs(config, sequence_length)
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
