"""Context parallel: every sequence cut among the ranks of `cp`.

A sequence of S positions is 2 cp chunks; rank i holds chunks i and 2 cp - 1 - i, so that under a causal
mask all ranks have as many visible pairs. What a layer's queries see of other ranks:

| layers                                          | what crosses                                             |
|-------------------------------------------------|----------------------------------------------------------|
| sliding                                         | the keys and values of the window across a chunk's ends  |
| full, in a variant whose layers share KV        | all of them, once; the layers that share them reuse them |
| full, otherwise                                 | all of them, block by block around a ring (ring.py); if  |
|                                                 | K = V as the one product both are made of                |

Masks are made of those of the whole sequence, which every rank of `cp` has, and carry the plan of their
exchange; documents shorten what crosses.

Letters of this file: X chunks, C positions of a chunk, R ranks, P positions of a rank; V the chunks of all sequences
that a rank holds, each with W keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from model import Gemma4, Gemma4Config
from model.attention import Attention, KeyValue, normed_key_value
from model.attention_kernels import attention
from model.inputs import Inputs, Masks, keep
from model.masks import AttentionMask
from model.rope import RotaryTable, rotary_table
from parallel.collectives import exchange_rows, gather_tokens
from parallel.context.ring import Parts, as_they_are, ring_attention


@dataclass(frozen=True)
class WindowMask(AttentionMask):
    """Each chunk counts as a sequence of its own, over the stretch of positions that its queries see.

    `sent` are the local tokens that other ranks need, rank by rank; `window_T` finds a chunk's keys
    among the local tokens and, after those, the received ones.
    """

    sent: Tensor
    sends: list[int]
    receives: list[int]
    window_T: Tensor

    def _on(self, device: torch.device) -> Self:
        sent, window_T = (t.to(device, non_blocking=True) for t in (self.sent, self.window_T))
        return replace(super()._on(device), sent=sent, window_T=window_T)


@dataclass(frozen=True)
class GatheredMask(AttentionMask):
    """A mask over all positions; `order_T` finds them among the ranks' tokens end to end."""

    order_T: Tensor

    def _on(self, device: torch.device) -> Self:
        return replace(super()._on(device), order_T=self.order_T.to(device, non_blocking=True))


@dataclass(frozen=True)
class RingMask(AttentionMask):
    """A mask over all positions; `parts` are its parts over the blocks that come around the ring.

    `positions` [T] of each block's tokens are those by which keys are rotated.
    """

    parts: Parts
    positions: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Self:
        """The parts ready for their kernel; the whole mask has none."""
        positions = tuple(t.to(device, non_blocking=True) for t in self.positions)
        parts = tuple(None if part is None else part.to(device) for part in self.parts)
        return replace(self._on(device), parts=parts, positions=positions)

    def select(self, queries: Tensor) -> Self:
        """The mask of a subset of the queries, in every block of the ring."""
        parts = tuple(None if part is None else part.select(queries) for part in self.parts)
        return replace(super().select(queries), parts=parts)


def _fields(mask: AttentionMask) -> dict[str, Any]:
    """What a mask was made of, without what it has computed and kept since."""
    return {field.name: getattr(mask, field.name) for field in fields(mask)}


class ContextParallel:
    """The cut of sequences among the ranks of a group of two or more."""

    def __init__(self, config: Gemma4Config, group: dist.ProcessGroup) -> None:
        self.config, self.group = config, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def cut(self, inputs: Inputs) -> Inputs:
        """This rank's positions of every sequence, on the CPU, with masks that see all of it.

        Positions, by which queries and keys are rotated, stay those of the whole sequence; `position_T` in the mask of
        a sliding layer counts from the start of a chunk's window.
        """
        B, S = inputs.batch_size, inputs.length
        here = self.part(torch.arange(B * S).view(B, S)).flatten()
        place = torch.full((B * S,), -1)
        place[here] = torch.arange(len(here))
        positions_BS = inputs.positions_T.view(B, S)
        masks: Masks = {}
        for layer_type, whole in inputs.masks.items():
            if layer_type == "sliding_attention":
                masks[layer_type] = self._window(whole)
            elif self.config.num_kv_shared_layers:
                masks[layer_type] = self._gathered(whole)
            else:
                masks[layer_type] = self._ring(whole, positions_BS)
        kept = None
        if inputs.kept is not None:
            local = place[inputs.kept.index]  # in increasing order, as chunks are on a rank
            kept = keep(masks, local[local >= 0])
        media = None if inputs.media is None else inputs.media.placed(place.__getitem__)
        return Inputs(inputs.tokens_T[here], inputs.positions_T[here], masks, kept, media, B, S // self.size)

    def part(self, x_BS: Tensor) -> Tensor:
        """This rank's [B, S / cp]."""
        return x_BS.unflatten(1, (2 * self.size, -1))[:, self._held()[self.rank]].flatten(1, 2)

    def apply(self, model: Gemma4) -> None:
        """Let the decoder layers of a model, or of one stage of it, exchange what their masks say."""
        for layer in model.layers:
            layer.self_attn.plan = self

    def key_value(self, layer: Attention, raw: KeyValue, table: RotaryTable, mask: AttentionMask) -> KeyValue:
        """What `attend` takes, of this rank's tokens; around a ring with K = V that is the raw product itself.

        Half as much then crosses, and each rank norms and rotates what arrives.
        """
        if isinstance(mask, RingMask) and layer.v_proj is None:
            return raw
        return self.exchange(layer.normed(raw, table), mask)

    def exchange(self, key_value: KeyValue, mask: AttentionMask) -> KeyValue:
        """Keys and values over which `attend` runs, for those of this rank's tokens."""
        if isinstance(mask, WindowMask):
            sent = torch.stack([t[mask.sent] for t in key_value], dim=1)
            received = exchange_rows(sent, mask.sends, mask.receives, self.group)
            parts = zip(key_value, received.unbind(dim=1), strict=True)
            return KeyValue(*(torch.cat(pair)[mask.window_T] for pair in parts))
        if isinstance(mask, GatheredMask):
            gathered = gather_tokens(torch.stack(key_value, dim=1), self.group)
            return KeyValue(*(t[mask.order_T] for t in gathered.unbind(dim=1)))
        return key_value

    def attend(self, layer: Attention, q_TNH: Tensor, key_value: KeyValue, mask: AttentionMask) -> Tensor:
        """Outputs of `attention`, over the keys of all ranks."""
        if not isinstance(mask, RingMask):
            return attention(q_TNH, *key_value, mask)
        if layer.v_proj is None:
            make = partial(self._normed_block, mask.positions)
            return ring_attention(q_TNH, key_value[:1], layer.k_norm.weight, make, mask.parts, self.group)
        return ring_attention(q_TNH, key_value, None, as_they_are, mask.parts, self.group)

    def _normed_block(
        self, positions: tuple[Tensor, ...], step: int, block: Sequence[Tensor], weight_H: Tensor | None
    ) -> KeyValue:
        (raw_TKH,) = block
        # Anew for every block: kept, the angles would be those of the whole sequence on every rank.
        table = rotary_table(self.config, "full_attention", positions[step], raw_TKH.dtype)
        return normed_key_value(KeyValue(raw_TKH, raw_TKH), weight_H, table, self.config.rms_norm_eps)

    def _window(self, whole: AttentionMask) -> WindowMask:
        B, S = whole.batch_size, whole.num_keys
        chunks, C = 2 * self.size, S // (2 * self.size)
        start_BX = whole.first_key_T.view(B, chunks, C).amin(dim=-1)
        end_BX = whole.last_key_T.view(B, chunks, C).amax(dim=-1) + 1
        owner_S, place_S = self._owners(S)
        place_BS = place_S + 2 * C * torch.arange(B)[:, None]

        position_S = torch.arange(S)
        needed_RBS = torch.stack(
            [
                ((position_S >= start_BX[:, held, None]) & (position_S < end_BX[:, held, None])).any(dim=1)
                & (owner_S != rank)
                for rank, held in enumerate(self._held().tolist())
            ]
        )
        sent_RBS = needed_RBS & (owner_S == self.rank)
        taker, sequence, position = sent_RBS.nonzero(as_tuple=True)  # by taker, then in order of place
        sequence_of, position_of = needed_RBS[self.rank].nonzero(as_tuple=True)
        order = owner_S[position_of].argsort(stable=True)
        found_BS = place_BS.clone()
        found_BS[sequence_of[order], position_of[order]] = 2 * C * B + torch.arange(len(order))

        held = self._held()[self.rank]
        start_V, end_V = start_BX[:, held].flatten(), end_BX[:, held].flatten()
        width = int((end_V - start_V).max())
        # A shorter stretch is filled up with any token, which none of its queries sees.
        key_VW = start_V[:, None] + torch.arange(width)
        sequence_V = torch.arange(B).repeat_interleave(2)
        window_VW = torch.where(key_VW < end_V[:, None], found_BS[sequence_V[:, None], key_VW.clamp_max(S - 1)], 0)

        cut, start_T = self._cut_mask(whole), start_V.repeat_interleave(C)
        return WindowMask(
            torch.arange(2 * B).repeat_interleave(C),
            cut.position_T - start_T,
            cut.first_key_T - start_T,
            cut.last_key_T - start_T,
            batch_size=2 * B,
            num_keys=width,
            sent=place_BS[sequence, position],
            sends=torch.bincount(taker, minlength=self.size).tolist(),
            receives=torch.bincount(owner_S[position_of], minlength=self.size).tolist(),
            window_T=window_VW.flatten(),
        )

    def _gathered(self, whole: AttentionMask) -> GatheredMask:
        B, S = whole.batch_size, whole.num_keys
        owner_S, place_S = self._owners(S)
        order_BS = (owner_S * B + torch.arange(B)[:, None]) * (S // self.size) + place_S
        return GatheredMask(**_fields(self._cut_mask(whole)), order_T=order_BS.flatten())

    def _ring(self, whole: AttentionMask, positions_BS: Tensor) -> RingMask:
        cut = self._cut_mask(whole)
        owner_S, place_S = self._owners(whole.num_keys)
        parts, positions = [], []
        for step in range(self.size):
            # In increasing order, so what an interval of positions holds of them is an interval again.
            keys = (owner_S == (self.rank - step) % self.size).nonzero()[:, 0]
            positions.append(positions_BS[:, keys].flatten())
            first_T = torch.searchsorted(keys, cut.first_key_T)
            last_T = torch.searchsorted(keys, cut.last_key_T, right=True) - 1
            empty_T = first_T > last_T
            part = AttentionMask(
                cut.batch_T,
                place_S[cut.position_T],
                first_T.masked_fill(empty_T, len(keys)),
                last_T.masked_fill(empty_T, -1),
                whole.batch_size,
                len(keys),
            )
            parts.append(None if bool(empty_T.all()) else part)
        return RingMask(**_fields(cut), parts=tuple(parts), positions=tuple(positions))

    def _cut_mask(self, whole: AttentionMask) -> AttentionMask:
        """The mask of this rank's queries, over the whole sequence."""
        here = torch.arange(whole.num_queries).view(whole.batch_size, whole.num_keys)
        return whole.select(self.part(here).flatten())

    def _held(self) -> Tensor:
        """Chunks [cp, 2] of each rank."""
        first = torch.arange(self.size)
        return torch.stack((first, 2 * self.size - 1 - first), dim=1)

    def _owners(self, length: int) -> tuple[Tensor, Tensor]:
        """Rank [S] of each position, and its place [S] in a sequence there."""
        held = self._held()
        chunk = length // (2 * self.size)
        owner_S, place_S = torch.empty(2, length, dtype=torch.long).unbind()
        position_RP = (held[..., None] * chunk + torch.arange(chunk)).flatten(1)
        owner_S[position_RP] = torch.arange(self.size)[:, None]
        place_S[position_RP] = torch.arange(2 * chunk)
        return owner_S, place_S
