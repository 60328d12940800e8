"""Pipeline parallel by torch.distributed.pipelining: the schedules, what crosses, the tied table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from model.encoders.config import ENCODER_MODULES
from model.inputs import Inputs
from model.precision import accumulation_dtype
from parallel.collectives import send_recv
from parallel.dtensors import local_part
from parallel.mesh import Mesh
from parallel.options import ParallelConfig
from parallel.pipeline.layout import num_stages
from parallel.pipeline.stage import Gemma4Stage, StageLoss, shapes_at
from parallel.pipeline.weight_gradients import WeightGradients
from parallel.torch_private import accumulate_gradients

_SCHEDULES: dict[str, Callable[..., Any]] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """Runs micro-batches forward, and backward where wanted, through the stages of all ranks of `pp`."""

    def __init__(self, stages: Sequence[Gemma4Stage], mesh: Mesh, options: ParallelConfig, dtype: torch.dtype) -> None:
        self.stages, self.mesh, self.name, self.dtype = stages, mesh, options.pp_schedule, dtype
        self.count = num_stages(options.pp_schedule, options.pp_virtual, mesh.layout.pp)
        self._schedules: dict[tuple[int, int, bool], Any] = {}

    def step(
        self, micro_batches: Sequence[Inputs], loss: StageLoss, device: torch.device, *, backward: bool = True
    ) -> None:
        """Gradients of the sum of `loss`, which the last stage calls for each micro-batch; or its calls alone."""
        if not self._schedules:  # the first step: weights are there
            for stage in self.stages:
                _gather_encoders_once(stage)
        num_micro_batches, tokens = len(micro_batches), len(micro_batches[0].tokens_T)
        key = (num_micro_batches, tokens, backward)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(num_micro_batches, tokens, device)
        for stage in self.stages:
            stage.micro_batches, stage.loss = micro_batches, loss
        numbers = torch.arange(len(micro_batches))
        first = any(stage.is_first for stage in self.stages)
        last = any(stage.is_last for stage in self.stages)
        schedule = self._schedules[key]
        (schedule.step if backward else schedule.eval)(
            *((numbers,) if first else ()),
            target=numbers if last else None,
            return_outputs=False,
            number=numbers,
        )
        for stage in self.stages:
            stage.micro_batches = ()
        if backward:
            self._add_tied()

    def _schedule(self, num_micro_batches: int, tokens: int, device: torch.device) -> Any:
        layout, pp = self.mesh.layout, self.mesh.layout.pp
        own_tokens = tokens // layout.tp if layout.tp > 1 and layout.sequence_parallel else tokens

        def local_heads(heads: int) -> int:
            return max(heads // layout.tp, 1)

        def crossing(border: int) -> tuple[Tensor, ...]:
            shapes = shapes_at(self.stages[0].config, border, tokens, own_tokens, local_heads)
            return tuple(torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True) for shape in shapes)

        wrapped = []
        for position, stage in enumerate(self.stages):
            index = self.mesh.at["pp"] + position * pp
            before: tuple[Tensor, ...] = (torch.zeros(1, dtype=torch.long),)
            after: tuple[Tensor, ...] = (torch.zeros(1, dtype=accumulation_dtype(self.dtype), requires_grad=True),)
            if not stage.is_first:
                before = crossing(stage.span.start)
            if not stage.is_last:
                after = crossing(stage.span.stop)
            wrapped.append(
                PipelineStage(
                    stage,
                    index,
                    self.count,
                    device,
                    input_args=before,
                    output_args=after,
                    group=self.mesh.pp,
                    dw_builder=None if stage.deferred is None else partial(_later, stage, stage.deferred),
                )
            )
        options = {"n_microbatches": num_micro_batches, "loss_fn": _already_a_loss, "scale_grads": False}
        return _SCHEDULES[self.name](wrapped[0] if self.name == "1f1b" else wrapped, **options)

    def tied_copies(self) -> list[Tensor]:
        """The token table of the last stage, which the first one has too."""
        return [stage.head_weight for stage in self.stages if stage.is_last and not stage.is_first]

    def _add_tied(self) -> None:
        """Sum the gradients of the token table's two copies, in the same order on both."""
        for stage in self.stages:
            if stage.is_first == stage.is_last:
                continue
            weight, group = stage.head_weight, self.mesh.pp
            if not weight.requires_grad:
                continue
            assert weight.grad is not None
            own = local_part(weight.grad)
            other = send_recv(own, group.size() - 1 if stage.is_first else 0, group)
            own.copy_(own + other if stage.is_first else other + own)


def _gather_encoders_once(stage: nn.Module) -> None:
    """Torch ends every backward of a stage in all its units, and fails at one that was never gathered."""
    for name in ENCODER_MODULES:
        for module in getattr(stage, name, nn.Module()).modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()


def _later(stage: Gemma4Stage, deferred: WeightGradients) -> Callable[[], None]:
    """What makes the weight gradients that a backward left, and adds them up in float32.

    FSDP does the latter behind a backward, which these come after; it reduces gradients of one dtype only.
    """
    make = deferred.take()

    def make_and_add() -> None:
        make()
        for layer in stage.layers:
            assert isinstance(layer, FSDPModule)
            accumulate_gradients(layer)

    return make_and_add


def _already_a_loss(output: Tensor, number: Tensor) -> Tensor:
    return output.sum()
