"""Which keys each query may see, as one interval per query, built once for a batch, before the model.

Causal, sliding-window and packed-document masks are all intervals [first_key, last_key] of the
query's own sequence, so one pair of integers per position stands behind every attention kernel:
`blocks` for the CPU kernel, `mask_mod` for flex attention, `dense` for tests. What a kernel needs to know on
the host is made by `prepared`, where the batch is, so that no layer waits for a device.
Which keys Gemma 4 shows a query is in docs/gemma4.md 3.4 and 3.5. Q counts the queries of a sequence, padded to
one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.tiles import QUERIES, query_spans, stretches
from model.token_types import is_vision

if TYPE_CHECKING:
    from model.config import Gemma4Config, LayerType

BLOCK_SIZE = 128
"""Queries in a block of the blocked kernel on a CPU; queries and keys in a tile of flex attention."""


class Block(NamedTuple):
    """Queries [query_start, query_end) of the flat query list, all of one sequence, and the keys they span."""

    sequence: int
    query_start: int
    query_end: int
    key_start: int
    key_end: int


class Tiles(NamedTuple):
    """`queries`: by size, the tiles of queries; `of_keys`: see `query_spans`; both, and the intervals, in int32."""

    queries: dict[int, Tensor]
    of_keys: Tensor
    first_key_T: Tensor
    last_key_T: Tensor

    def to(self, device: torch.device) -> Tiles:
        """The tables on a device."""
        queries = {size: table.to(device, non_blocking=True) for size, table in self.queries.items()}
        return Tiles(queries, *(table.to(device, non_blocking=True) for table in self[1:]))


class Padding(NamedTuple):
    """`index_BQ`: query of each padded place (0 where none); `real_BQ`: which are real; `real_T`: their flat places."""

    index_BQ: Tensor
    real_BQ: Tensor
    real_T: Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Visible keys of T queries, in order of sequence.

    `batch_T` is the sequence of a query, `first_key_T` and `last_key_T` (inclusive) its interval
    among the `num_keys` keys of that sequence, `position_T` the key index of the query itself. Only
    `partial_attention` takes queries that see no key; their interval is [num_keys, -1].
    """

    batch_T: Tensor
    position_T: Tensor
    first_key_T: Tensor
    last_key_T: Tensor
    batch_size: int
    num_keys: int

    def select(self, queries: Tensor) -> Self:
        """The mask of a subset of the queries, given as sorted indices."""
        return self._with_queries(lambda t: t[queries])

    def prepared(self) -> Self:
        """The same mask, with all made that kernels need to know on the host."""
        _ = self.blocks, self.padding
        return self

    def to(self, device: torch.device) -> Self:
        """The mask on a device, prepared by the values that are still here."""
        moved, padding = self._on(device), self.padding
        made = vars(moved)  # where `cached_property` keeps what it has made
        made["blocks"] = self.blocks if device.type == "cpu" else self.blocks_of(gpu_block_size(self.num_keys))
        made["padding"] = padding and Padding(*(t.to(device, non_blocking=True) for t in padding))
        if device.type == "cuda":
            _ = moved.block_mask
            if self.num_queries:
                made["tiles"] = self.tiles.to(device)
        return moved

    def _on(self, device: torch.device) -> Self:
        return self._with_queries(lambda t: t.to(device, non_blocking=True))

    def _with_queries(self, change: Callable[[Tensor], Tensor]) -> Self:
        batch, position, first, last = map(change, (self.batch_T, self.position_T, self.first_key_T, self.last_key_T))
        return replace(self, batch_T=batch, position_T=position, first_key_T=first, last_key_T=last)

    @property
    def num_queries(self) -> int:
        """How many queries the mask has, over all sequences."""
        return self.batch_T.numel()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks for the CPU."""
        return self.blocks_of(BLOCK_SIZE)

    def blocks_of(self, size: int) -> tuple[Block, ...]:
        """Runs of queries in one aligned stretch of a sequence; one that asks or sees nothing costs nothing."""
        if self.num_queries == 0:
            return ()
        blocks = map(Block._make, self._stretches(size).tolist())
        return tuple(block for block in blocks if block.key_start < block.key_end)

    def _stretches(self, size: int) -> Tensor:
        return stretches(self.batch_T, self.position_T, self.first_key_T, self.last_key_T, self.num_keys, size)

    @cached_property
    def tiles(self) -> Tiles:
        """Tables for kernels that go through tiles of queries and of keys; at least one query."""
        return Tiles(
            {size: self._stretches(size).int() for size in QUERIES},
            query_spans(self._stretches(min(QUERIES)), self.batch_size, self.num_keys),
            self.first_key_T.int(),
            self.last_key_T.int(),
        )

    @cached_property
    def padding(self) -> Padding | None:
        """How to give every sequence the same number of queries; None if they have it already."""
        counts = torch.bincount(self.batch_T, minlength=self.batch_size)
        most = int(counts.max())
        if most * self.batch_size == self.num_queries:
            return None
        start = counts.cumsum(0) - counts
        column = torch.arange(most, device=counts.device)
        real_BQ = column[None, :] < counts[:, None]
        index_BQ = torch.where(real_BQ, start[:, None] + column[None, :], 0)
        return Padding(index_BQ, real_BQ, real_BQ.flatten().nonzero()[:, 0])

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask as flex attention's block-sparse one, made from the intervals, without a look at every pair."""
        first_BQ, last_BQ = self._padded()
        missing = -first_BQ.shape[1] % BLOCK_SIZE
        # A place without a query sees nothing, so that its tile is never taken for one that sees all.
        first = F.pad(first_BQ, (0, missing), value=self.num_keys).unflatten(1, (-1, BLOCK_SIZE))
        last = F.pad(last_BQ, (0, missing), value=-1).unflatten(1, (-1, BLOCK_SIZE))
        starts = torch.arange(0, self.num_keys, BLOCK_SIZE, device=first.device)
        ends = starts + BLOCK_SIZE - 1
        seen = (starts <= last.amax(-1, keepdim=True)) & (ends >= first.amin(-1, keepdim=True))
        whole = (starts >= first.amax(-1, keepdim=True)) & (ends <= last.amin(-1, keepdim=True))
        return BlockMask.from_kv_blocks(
            *_ordered(seen & ~whole),
            *_ordered(whole),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=self.mask_mod(),
            seq_lengths=(first_BQ.shape[1], self.num_keys),
        )

    def _padded(self) -> tuple[Tensor, Tensor]:
        """First and last key of each padded query [B, Q], in int32; one that is none sees no key."""
        first, last = self.first_key_T.int(), self.last_key_T.int()
        if self.padding is None:
            return first.unflatten(0, (self.batch_size, -1)), last.unflatten(0, (self.batch_size, -1))
        index, real = self.padding.index_BQ, self.padding.real_BQ
        return first[index].masked_fill(~real, self.num_keys), last[index].masked_fill(~real, -1)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same mask over the padded queries, in the form flex attention takes."""
        first, last = self._padded()

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k >= first[b, q]) & (k <= last[b, q])

        return visible

    def dense(self) -> Tensor:
        """Bool [T, num_keys]: True where the query may look."""
        keys = torch.arange(self.num_keys, device=self.batch_T.device)
        return (keys >= self.first_key_T[:, None]) & (keys <= self.last_key_T[:, None])


def gpu_block_size(num_keys: int) -> int:
    """Queries in a block of the blocked kernel on a GPU: many, but few of a long sequence, whose scores are held."""
    return min(512, max(64, (1 << 22) // num_keys // 64 * 64))


def _ordered(tiles_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of tiles, over one head: how many are set, and their columns, first those, in order."""
    tiles = tiles_BQK[:, None].int()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()


def attention_mask(
    batch_size: int,
    num_keys: int,
    *,
    window: int | None = None,
    document_ids_BS: Tensor | None = None,
    vision_BS: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> AttentionMask:
    """Causal mask of every position of a batch: within the document, within the window (docs/gemma4.md 3.4).

    A document is a run of equal ids; ids need not be unique across runs. Positions of a run of
    `vision_BS` (bool; the soft tokens of one image or frame) also see the rest of their run.
    """
    position_BS = torch.arange(num_keys, device=device).expand(batch_size, num_keys)
    first_BS = torch.zeros_like(position_BS)
    starts_BS = torch.zeros_like(position_BS, dtype=torch.bool)
    if document_ids_BS is not None:
        starts_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
        first_BS = torch.where(starts_BS, position_BS, 0).cummax(dim=1).values
    last_BS = position_BS if vision_BS is None else run_ends(vision_BS, starts_BS, position_BS)
    if window is not None:
        first_BS = torch.maximum(first_BS, position_BS - (window - 1))
    batch_BS = torch.arange(batch_size, device=device)[:, None].expand(batch_size, num_keys)
    return AttentionMask(
        batch_BS.flatten(), position_BS.flatten(), first_BS.flatten(), last_BS.flatten(), batch_size, num_keys
    )


def layer_masks(
    config: Gemma4Config, types_BS: Tensor, document_ids_BS: Tensor | None
) -> dict[LayerType, AttentionMask]:
    """Masks by layer type: causal; on sliding layers of 12B, 26B and 31B images see both ways (docs/gemma4.md 3.5)."""
    masks: dict[LayerType, AttentionMask] = {}
    for layer_type in dict.fromkeys(config.layer_types):
        sliding = layer_type == "sliding_attention"
        masks[layer_type] = attention_mask(
            *types_BS.shape,
            window=config.sliding_window if sliding else None,
            document_ids_BS=document_ids_BS,
            vision_BS=is_vision(types_BS) if sliding and config.sees_images_both_ways else None,
            device=types_BS.device,
        )
    return masks


def segment_mask(lengths: Sequence[int]) -> AttentionMask:
    """One sequence of segments end to end; every position sees its whole segment and nothing else."""
    total, sizes = sum(lengths), torch.tensor(lengths, dtype=torch.long)
    ends = sizes.cumsum(0)
    first_T, last_T = (t.repeat_interleave(sizes, output_size=total) for t in (ends - sizes, ends - 1))
    position_T = torch.arange(total)
    return AttentionMask(torch.zeros_like(position_T), position_T, first_T, last_T, 1, total)


def run_ends(vision_BS: Tensor, starts_BS: Tensor, position_BS: Tensor) -> Tensor:
    """Last position of the run of vision tokens that each position lies in, of one document; itself elsewhere."""
    goes_on_BS = torch.zeros_like(vision_BS)  # into the next position
    goes_on_BS[:, :-1] = vision_BS[:, :-1] & vision_BS[:, 1:] & ~starts_BS[:, 1:]
    stops_BS = torch.where(goes_on_BS, position_BS.shape[1], position_BS)
    return stops_BS.flip(1).cummin(dim=1).values.flip(1)
