"""One stage of a pipeline: a run of decoder layers, with what comes before the first and after the last of all.

What crosses a border, with gradients, in shapes that are the same for every micro-batch:

| tensor                          | shape               | for                                                     |
|---------------------------------|---------------------|---------------------------------------------------------|
| hidden states                   | [T, D]              | all                                                     |
| inputs of the layers to come    | [layers, T, P]      | variants with per-layer inputs (images and sound in it) |
| keys, values of each type       | [T, K, H] each      | when layers to come share those made before the border  |

Keys and values cross as this rank's tokens made them; a stage exchanges them anew where context
parallel cuts sequences. Only the last stage prunes positions whose output nobody wants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import Gemma4, Gemma4Config
from model.attention import KeyValue
from model.config import LayerType
from model.decoder import decode, first_pruned
from model.head import Head
from model.inputs import Inputs, Masks

if TYPE_CHECKING:
    from parallel.context.plan import ContextParallel
    from parallel.pipeline.weight_gradients import WeightGradients

StageLoss = Callable[[Tensor, Head, Tensor, int], Tensor]
"""Loss of kept hidden states [T, D] of a micro-batch, given the head, its table and the micro-batch's number."""


class Gemma4Stage(Gemma4):
    """Layers `span` of a model as torch's pipeline runs them; build it on `meta`."""

    micro_batches: Sequence[Inputs]
    loss: StageLoss
    context: ContextParallel | None = None
    """Set where sequences are cut among ranks."""
    deferred: WeightGradients | None = None
    """Set where a schedule makes weight gradients apart."""

    def __init__(self, config: Gemma4Config, span: range) -> None:
        super().__init__(config, span)
        self.is_first, self.is_last = span.start == 0, span.stop == config.num_hidden_layers

    def forward(self, *received: Tensor, number: Tensor) -> tuple[Tensor, ...] | Tensor:  # type: ignore[override]
        """What crosses the next border, or, from the last stage, the loss [1] of micro-batch `number`."""
        inputs = self.micro_batches[int(number)]
        kept = inputs.kept
        if not self.is_last:  # what crosses a border has one shape for all micro-batches
            inputs = replace(inputs, kept=None)
        shared: dict[LayerType, KeyValue] = {}
        if self.is_first:
            x_TD, per_layer = self.embed(replace(inputs, kept=None))
        else:
            x_TD, per_layer, shared = self._unpack(received, inputs.masks)
        if inputs.kept is not None and per_layer:
            pruned = range(max(first_pruned(self.config), self.span.start), self.span.stop)
            taken = inputs.kept.take(torch.cat([per_layer[index] for index in pruned], dim=1))
            per_layer |= dict(zip(pruned, taken.chunk(len(pruned), dim=1), strict=True))
        x_TD, shared = decode(self.config, self.layers, x_TD, per_layer, inputs, shared)
        if not self.is_last:
            return self._pack(x_TD, per_layer or {}, shared, inputs.masks)
        assert kept is not None
        hidden_TD = self.language_model.norm(x_TD)[: kept.count]
        return torch.stack([self.loss(hidden_TD, self.head, self.head_weight, int(number))])

    def _pack(
        self, x_TD: Tensor, per_layer: dict[int, Tensor], shared: dict[LayerType, KeyValue], masks: Masks
    ) -> tuple[Tensor, ...]:
        config, end = self.config, self.span.stop
        out = [x_TD]
        if per_layer:
            out.append(torch.stack([per_layer[index] for index in range(end, config.num_hidden_layers)]))
        for layer_type in carried_types(config, end):
            mask = masks[layer_type]
            own = mask.batch_T * mask.num_keys + mask.position_T  # this rank's tokens, among all that its queries see
            out += [t[own] for t in shared[layer_type]]
        return tuple(out)

    def _unpack(
        self, received: Sequence[Tensor], masks: Masks
    ) -> tuple[Tensor, dict[int, Tensor] | None, dict[LayerType, KeyValue]]:
        config, start = self.config, self.span.start
        x_TD, *rest = received
        per_layer: dict[int, Tensor] | None = None
        if config.hidden_size_per_layer_input:
            per_layer = dict(zip(range(start, config.num_hidden_layers), rest.pop(0).unbind(), strict=True))
        shared: dict[LayerType, KeyValue] = {}
        for layer_type in carried_types(config, start):
            own, mask = KeyValue(rest.pop(0), rest.pop(0)), masks[layer_type]
            shared[layer_type] = own if self.context is None else self.context.exchange(own, mask)
        return x_TD, per_layer, shared


def carried_types(config: Gemma4Config, border: int) -> list[LayerType]:
    """Types of attention whose keys and values, made before layer `border`, are read from there on."""
    read = {config.layer(i).type for i in range(border, config.num_hidden_layers) if config.layer(i).kv_source < border}
    return [kind for kind in dict.fromkeys(config.layer_types) if kind in read]


def shapes_at(
    config: Gemma4Config, border: int, tokens: int, own_tokens: int, local_heads: Callable[[int], int]
) -> tuple[tuple[int, ...], ...]:
    """Shapes of what crosses a border, where this rank has the hidden states of `own_tokens` of the `tokens`.

    `local_heads` gives how many of so many KV heads are here.
    """
    found: list[tuple[int, ...]] = [(own_tokens, config.hidden_size)]
    if config.hidden_size_per_layer_input:
        found.append((config.num_hidden_layers - border, own_tokens, config.hidden_size_per_layer_input))
    for kind in carried_types(config, border):
        layer = next(layer for layer in map(config.layer, range(border)) if layer.type == kind)
        found += [(tokens, local_heads(layer.num_kv_heads), layer.head_dim)] * 2
    return tuple(found)


class Stages(nn.Module):
    """The stages that one rank holds, as one module whose parameters have the names of the whole model."""

    def __init__(self, stages: Sequence[Gemma4Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        """Parameters of all stages, without the number of their stage in the name."""
        for stage in self.stages:
            yield from stage.named_parameters(prefix, recurse, remove_duplicate)

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        """Modules of all stages, without the number of their stage in the name."""
        for stage in self.stages:
            yield from stage.named_modules(memo, prefix, remove_duplicate)
