"""One stage of a pipeline: a run of decoder layers, with what comes before the first and after the last of all.

What crosses a border, with gradients, in shapes that are the same for every micro-batch:

| tensor                          | shape               | for                                                     |
|---------------------------------|---------------------|---------------------------------------------------------|
| stream                          | [T, D]              | all                                                     |
| inputs of the layers to come    | [layers, T, P]      | variants with per-layer inputs (images and sound in it) |
| keys, values of each type       | [T, K, H] each      | when layers to come share those made before the border  |

Keys and values cross as this rank's tokens made them; a stage exchanges them anew where context
parallel cuts sequences. The stream narrows to supervised positions in the last stage only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from model import Gemma4, Gemma4Config
from model.attention import KeyValue
from model.config import LayerType
from model.decoder import DecoderLayer, decode
from model.gemma4 import ENCODERS
from model.head import Head
from model.masks import AttentionMask
from model.media import Media, token_types

if TYPE_CHECKING:
    from parallel.weight_gradients import WeightGradients

_FIRST_TEXT = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")


class MicroBatch(NamedTuple):
    """What every stage is given of a micro-batch; integer and bool tensors [B, S]."""

    tokens_BS: Tensor
    positions_BS: Tensor
    supervised_BS: Tensor
    media: Media | None
    masks: dict[LayerType, AttentionMask]


StageLoss = Callable[[Tensor, Head, Tensor, int], Tensor]
"""Loss of supervised hidden states [T, D] of a micro-batch, given the head, its table and the micro-batch's number."""


class Gemma4Stage(Gemma4):
    """Layers `span` of a model, under the names they have in the whole; build it on `meta`."""

    micro_batches: Sequence[MicroBatch]
    loss: StageLoss
    deferred: WeightGradients | None = None
    """Set where a schedule makes weight gradients apart."""

    def __init__(self, config: Gemma4Config, span: range) -> None:
        super().__init__(config)
        text, self.span = self.language_model, span
        self.is_first, self.is_last = span.start == 0, span.stop == config.num_hidden_layers
        for index in range(config.num_hidden_layers):
            if index not in span:
                delattr(text.layers, str(index))
        if not self.is_first:
            for owner, names in ((self, ENCODERS), (text, _FIRST_TEXT)):
                for name in names:
                    if hasattr(owner, name):
                        delattr(owner, name)
        if not (self.is_first or self.is_last):
            del text.embed_tokens
        if not self.is_last:
            del text.norm

    def forward(self, *received: Tensor, number: Tensor) -> tuple[Tensor, ...] | Tensor:  # type: ignore[override]
        """What crosses the next border, or, from the last stage, the loss [1] of micro-batch `number`."""
        config, batch = self.config, self.micro_batches[int(number)]
        masks = batch.masks
        shared: dict[LayerType, KeyValue] = {}
        per_layer: dict[int, Tensor] = {}
        if self.is_first:
            types_BS = token_types(config, batch.tokens_BS)
            x_TD, inputs = self.embed(batch.tokens_BS, types_BS, batch.media, None, config.num_hidden_layers)
            per_layer = dict(enumerate(inputs or ()))
        else:
            x_TD, per_layer, shared = self._unpack(received, masks)
        rows = self.stream.rows(batch.supervised_BS) if self.is_last else None
        narrow_at = max(config.first_kv_shared_layer - 1, self.span.start)
        if rows is not None and per_layer:
            later = range(narrow_at, config.num_hidden_layers)
            taken = rows.take(torch.cat([per_layer[index] for index in later], dim=1))
            per_layer |= dict(zip(later, taken.chunk(len(later), dim=1), strict=True))
        contexts, narrowed = self.contexts(masks, batch.positions_BS, rows, x_TD.dtype)
        layers = self.language_model.layers
        x_TD, shared = decode(layers, x_TD, per_layer or None, contexts, narrowed, rows, narrow_at, shared)
        if rows is None:
            return self._pack(x_TD, per_layer, shared, masks)
        hidden_TD = self.language_model.norm(x_TD)[: rows.count]
        return torch.stack([self.loss(hidden_TD, self.head, self.head_weight, int(number))])

    def _pack(
        self,
        x_TD: Tensor,
        per_layer: dict[int, Tensor],
        shared: dict[LayerType, KeyValue],
        masks: dict[LayerType, AttentionMask],
    ) -> tuple[Tensor, ...]:
        config, end = self.config, self.span.stop
        out = [x_TD]
        if per_layer:
            out.append(torch.stack([per_layer[index] for index in range(end, config.num_hidden_layers)]))
        for kind in carried_types(config, end):
            mask = masks[kind]
            own = mask.row_T * mask.num_keys + mask.position_T  # this rank's tokens, among all that its queries see
            out += [t[own] for t in shared[kind]]
        return tuple(out)

    def _unpack(
        self, received: Sequence[Tensor], masks: dict[LayerType, AttentionMask]
    ) -> tuple[Tensor, dict[int, Tensor], dict[LayerType, KeyValue]]:
        config, start = self.config, self.span.start
        x_TD, *rest = received
        per_layer: dict[int, Tensor] = {}
        if config.hidden_size_per_layer_input:
            per_layer = dict(zip(range(start, config.num_hidden_layers), rest.pop(0).unbind(), strict=True))
        shared: dict[LayerType, KeyValue] = {}
        plan = cast(DecoderLayer, next(iter(self.language_model.layers))).self_attn.plan
        for kind in carried_types(config, start):
            made = KeyValue(rest.pop(0), rest.pop(0))
            shared[kind] = made if plan is None else plan.exchange(made, masks[kind])
        return x_TD, per_layer, shared


def carried_types(config: Gemma4Config, border: int) -> list[LayerType]:
    """Types of attention whose keys and values, made before layer `border`, are read from there on."""
    read = {config.layer(i).type for i in range(border, config.num_hidden_layers) if config.layer(i).kv_source < border}
    return [kind for kind in dict.fromkeys(config.layer_types) if kind in read]


def shapes_at(
    config: Gemma4Config, border: int, tokens: int, stream: int, held: Callable[[int], int]
) -> tuple[tuple[int, ...], ...]:
    """Shapes of what crosses a border, given tokens and stream rows of this rank; `held`: KV heads here of so many."""
    found: list[tuple[int, ...]] = [(stream, config.hidden_size)]
    if config.hidden_size_per_layer_input:
        found.append((config.num_hidden_layers - border, stream, config.hidden_size_per_layer_input))
    for kind in carried_types(config, border):
        layer = next(layer for layer in map(config.layer, range(border)) if layer.type == kind)
        found += [(tokens, held(layer.num_kv_heads), layer.head_dim)] * 2
    return tuple(found)


class Stages(nn.Module):
    """The stages that one rank holds, as one module whose parameters have the names of the whole model."""

    def __init__(self, stages: Sequence[Gemma4Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        for stage in self.stages:
            yield from stage.named_parameters(prefix, recurse, remove_duplicate)

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        for stage in self.stages:
            yield from stage.named_modules(memo, prefix, remove_duplicate)
