"""Pipeline parallel by torch.distributed.pipelining: where stages are cut, the schedule, the tied table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from model.config import ConfigError, Gemma4Config
from parallel.collectives import swap
from parallel.mesh import Mesh
from parallel.sharded import local_part
from parallel.stage import Computed, Gemma4Stage, MicroBatch, shapes_at

SCHEDULES: dict[str, Callable[..., Any]] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


def num_stages(schedule: str, virtual: int, pp: int) -> int:
    return pp if schedule == "1f1b" else pp * virtual


def check_pipeline(
    schedule: str, virtual: int, pp: int, num_layers: int, num_micro_batches: int, activation_checkpoint: str
) -> None:
    """Raises `ConfigError` for what a schedule cannot run, with the nearest that it can."""
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
    if schedule == "zero_bubble" and activation_checkpoint != "none":
        raise ConfigError(
            "parallel.pp_schedule=zero_bubble goes backward twice, which activation_checkpoint.mode="
            f"{activation_checkpoint} does not allow; nearest legal: parallel.pp_schedule=interleaved."
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
    """The runs of layers whose dearest stage, the head counted to the last, is cheapest."""
    costs = layer_costs(config, sequence_length)
    costs[-1] += config.hidden_size * config.vocab_size
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    count = len(costs)
    # best[k][end]: the dearest of k stages over the first `end` layers, and where the last of them starts
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for k in range(1, stages + 1):
        best.append(
            {
                end: min(
                    (max(dearest, total[end] - total[start]), -start)
                    for start, (dearest, _) in best[k - 1].items()
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


class Pipeline:
    """Runs micro-batches forward and backward through the stages of all ranks of `pp`."""

    def __init__(
        self, stages: Sequence[Gemma4Stage], mesh: Mesh, schedule: str, count: int, dtype: torch.dtype
    ) -> None:
        self.stages, self.mesh, self.name, self.count, self.dtype = stages, mesh, schedule, count, dtype
        self._schedules: dict[tuple[int, ...], Any] = {}

    def step(
        self, micro_batches: Sequence[MicroBatch], loss: Callable[[Computed, int], Tensor], device: torch.device
    ) -> None:
        """Gradients of the sum of `loss(model, number)`, which the last stage calls for each micro-batch."""
        key = (len(micro_batches), *micro_batches[0].tokens_BS.shape)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(len(micro_batches), micro_batches[0].tokens_BS.numel(), device)
        for stage in self.stages:
            stage.micro_batches, stage.loss = micro_batches, loss
        numbers = torch.arange(len(micro_batches))
        first = any(stage.is_first for stage in self.stages)
        last = any(stage.is_last for stage in self.stages)
        self._schedules[key].step(
            *((numbers,) if first else ()),
            target=numbers if last else None,
            return_outputs=False,
            number=numbers,
        )
        for stage in self.stages:
            stage.micro_batches = ()
        self._add_tied()

    def _schedule(self, num_micro_batches: int, tokens: int, device: torch.device) -> Any:
        layout, pp = self.mesh.layout, self.mesh.layout.pp
        stream = tokens // layout.tp if layout.tp > 1 and layout.sequence_parallel else tokens

        def held(heads: int) -> int:
            return max(heads // layout.tp, 1)

        def crossing(border: int) -> tuple[Tensor, ...]:
            shapes = shapes_at(self.stages[0].config, border, tokens, stream, held)
            return tuple(torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True) for shape in shapes)

        wrapped = []
        for position, stage in enumerate(self.stages):
            index = self.mesh.at["pp"] + position * pp
            before: tuple[Tensor, ...] = (torch.zeros(1, dtype=torch.long),)
            after: tuple[Tensor, ...] = (torch.zeros(1, requires_grad=True),)
            if not stage.is_first:
                before = crossing(stage.span.start)
            if not stage.is_last:
                after = crossing(stage.span.stop)
            wrapped.append(
                PipelineStage(
                    stage, index, self.count, device, input_args=before, output_args=after, group=self.mesh.pp
                )
            )
        options = {"n_microbatches": num_micro_batches, "loss_fn": _already_a_loss, "scale_grads": False}
        return SCHEDULES[self.name](wrapped[0] if self.name == "1f1b" else wrapped, **options)

    def tied_copies(self) -> list[Tensor]:
        """The token table of the last stage, which the first one has too."""
        return [stage.head_weight for stage in self.stages if stage.is_last and not stage.is_first]

    def _add_tied(self) -> None:
        """Sum the gradients of the token table's two copies, in the same order on both."""
        for stage in self.stages:
            if stage.is_first == stage.is_last:
                continue
            weight, group = stage.head_weight, self.mesh.pp
            assert weight.grad is not None
            own = local_part(weight.grad)
            other = swap(own, group.size() - 1 if stage.is_first else 0, group)
            own.copy_(own + other if stage.is_first else other + own)


def _already_a_loss(output: Tensor, number: Tensor) -> Tensor:
    return output.sum()
