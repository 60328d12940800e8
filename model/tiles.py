"""Which keys a tile of queries has to look at, and which queries a tile of keys, as tables of numbers.

They only say what can be skipped: within a tile each query's own interval decides. They are made on the host, where
the batch is, so that no layer waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = (32, 64, 128)
"""Sizes of query tiles that kernels have."""
KEYS = 64
"""Keys of a tile in the table of spans; a kernel's tile of keys is this large or divides it."""


def stretches(
    batch_T: Tensor, position_T: Tensor, first_key_T: Tensor, last_key_T: Tensor, num_keys: int, size: int
) -> Tensor:
    """Runs of queries in one aligned stretch of a sequence, in order: [n, 5] of int64.

    Columns: sequence, first query, end of queries, first key that one of them sees, end of keys that one of them sees.
    Arguments are those of `model.masks.AttentionMask`; there is at least one query.
    """
    per_sequence = num_keys // size + 1
    stretch, counts = torch.unique_consecutive(batch_T * per_sequence + position_T // size, return_counts=True)
    ends = counts.cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    first = torch.full_like(counts, num_keys).scatter_reduce_(0, owner, first_key_T, "amin")
    last = torch.zeros_like(counts).scatter_reduce_(0, owner, last_key_T, "amax")
    return torch.stack((stretch // per_sequence, ends - counts, ends, first, last + 1), dim=1)


def query_spans(stretches_n5: Tensor, batch_size: int, num_keys: int) -> Tensor:
    """For each tile of keys [B, S / KEYS] the first query of its sequence that may see one, and the end of those."""
    sequence, start, end, first_key, end_key = stretches_n5.unbind(1)
    tiles = -(-num_keys // KEYS)
    keys = torch.arange(tiles, device=sequence.device) * KEYS
    seen = (first_key[:, None] < keys + KEYS) & (end_key[:, None] > keys)
    none = int(torch.iinfo(torch.int32).max)
    owner = sequence[:, None].expand(-1, tiles)
    low = torch.full((batch_size, tiles), none, device=keys.device)
    low.scatter_reduce_(0, owner, torch.where(seen, start[:, None], none), "amin")
    high = torch.zeros_like(low).scatter_reduce_(0, owner, torch.where(seen, end[:, None], 0), "amax")
    return torch.stack((low.clamp(max=high), high), dim=-1).int()
