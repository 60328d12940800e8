"""The attention kernels against plain softmax attention under the same mask, and the masks themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from model import Gemma4Config
from model.attention_kernels import (
    LARGEST_FLEX_HEAD,
    attention,
    blocked,
    flex_call,
    flex_over,
    flex_shared_memory,
    kernel_for,
)
from model.masks import BLOCK_SIZE, AttentionMask, attention_mask, gpu_block_size, segment_mask
from model.variants import VARIANT_NAMES
from tests.harness.report import report

B, K, G, H = 2, 2, 3, 8


def plain(q_TNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: AttentionMask) -> Tensor:
    k, v = (t.repeat_interleave(G, dim=2)[mask.batch_T] for t in (k_BSKH, v_BSKH))
    scores = torch.einsum("tnh,tsnh->tns", q_TNH, k).masked_fill(~mask.dense()[:, None], float("-inf"))
    return torch.einsum("tns,tsnh->tnh", scores.softmax(-1), v)


def documents(length: int) -> Tensor:
    ids = torch.zeros(B, length, dtype=torch.long)
    ids[0, length // 3 :] = 1
    ids[0, length // 2 :] = 7
    ids[1, 1:] = 5
    return ids


CASES = [
    pytest.param(length, window, packed, subset, id=f"{length}-{window}-{packed}-{subset}")
    for length in (1, 50, 2 * BLOCK_SIZE + 37)
    for window in (None, 1, 16, BLOCK_SIZE + 5)
    for packed in (False, True)
    for subset in (False, True)
]


def make(length: int, window: int | None, packed: bool, subset: bool) -> tuple[AttentionMask, list[Tensor]]:
    generator = torch.Generator().manual_seed(length)
    mask = attention_mask(B, length, window=window, document_ids_BS=documents(length) if packed else None)
    if subset:
        mask = mask.select((torch.rand(B * length, generator=generator) < 0.15).nonzero()[:, 0])
    shapes = ((mask.num_queries, K * G, H), (B, length, K, H), (B, length, K, H))
    return mask, [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("length", "window", "packed", "subset"), CASES)
def test_blocked_equals_plain_attention(length: int, window: int | None, packed: bool, subset: bool) -> None:
    mask, inputs = make(length, window, packed, subset)
    q, k, v = inputs
    expected, found = plain(q, k, v, mask), blocked(q, k, v, mask)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    if mask.num_queries:
        for a, b in zip(
            torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("window", [None, 16])
def test_flex_gives_the_same_under_the_same_mask(
    window: int | None, subset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch refuses flex gradients on a CPU by this check alone; eager flex computes them all the same.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    mask, inputs = make(2 * BLOCK_SIZE, window, True, subset)
    inputs = [t.detach().float().requires_grad_() for t in inputs]
    q, k, v = inputs
    found, expected = flex_over(flex_call, q, k, v, mask), blocked(q, k, v, mask)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    grad = torch.randn(expected.shape)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("length", "window", "packed", "subset"), CASES)
def test_tiles_of_flex_are_those_of_a_look_at_every_pair(
    length: int, window: int | None, packed: bool, subset: bool
) -> None:
    """None is missing; one that torch finds empty may be there, since intervals of a tile are taken for their hull."""
    mask, _ = make(length, window, packed, subset)
    if not mask.num_queries:
        return
    found = mask.block_mask
    queries = found.seq_lengths[0]
    expected = create_block_mask(mask.mask_mod(), B, None, queries, length, device="cpu")
    assert found.seq_lengths == expected.seq_lengths and found.kv_indices.dtype == expected.kv_indices.dtype
    whole, expected_whole = (_tiles(m.full_kv_num_blocks, m.full_kv_indices) for m in (found, expected))
    assert torch.equal(whole, expected_whole)
    some, needed = (_tiles(m.kv_num_blocks, m.kv_indices) for m in (found, expected))
    assert bool((some | ~needed).all()), "no tile that is needed is left out"
    if not subset:
        assert torch.equal(some, needed)


def _tiles(counts: Tensor | None, columns: Tensor | None) -> Tensor:
    """Bool [B, Q tiles, K tiles] of the tiles that are listed."""
    assert counts is not None and columns is not None
    listed = torch.arange(columns.shape[-1]) < counts[..., None]
    return torch.zeros_like(listed).scatter_(-1, columns.long(), listed)[:, 0]


def test_wide_heads_never_go_to_a_kernel_that_cannot_start() -> None:
    """What a block of an A100, H100 and B200 has, beside what flex attention asks for (docs/gemma4.md 3.1)."""
    limits, bfloat16 = {"A100": 166_912, "H100": 232_448, "B200": 232_448}, 2
    for name in VARIANT_NAMES:
        config = Gemma4Config.from_name(name)
        for kind, width in (("sliding", config.head_dim), ("full", config.global_head_dim)):
            kernel = kernel_for("cuda", width, torch.bfloat16).__name__
            asks = flex_shared_memory(width, bfloat16)
            report("Kernels on a GPU", {"layers": f"{name} {kind}", "head": width, "kernel": kernel, "flex asks": asks})
            assert kernel_for("cpu", width, torch.bfloat16) is blocked
            assert kernel == "flex" if width <= LARGEST_FLEX_HEAD else kernel == "blocked"
            if kernel == "flex":
                assert asks <= min(limits.values())
    assert flex_shared_memory(512, bfloat16) == 262_144 > max(limits.values())


@pytest.mark.parametrize("size", [64, 512])
def test_blocks_of_any_size_give_the_same(size: int) -> None:
    mask, inputs = make(2 * BLOCK_SIZE + 37, None, True, False)
    q, k, v = inputs
    expected = blocked(q, k, v, mask)
    resized = mask.select(torch.arange(mask.num_queries))
    vars(resized)["blocks"] = mask.blocks_of(size)
    assert len(resized.blocks) != len(mask.blocks)
    torch.testing.assert_close(blocked(q, k, v, resized), expected, atol=1e-12, rtol=1e-12)
    assert [gpu_block_size(keys) for keys in (100, 8192, 16_384, 131_072)] == [512, 512, 256, 64]


def test_masks_are_the_formulas_of_the_reference() -> None:
    length, window = 30, 7
    ids = documents(length)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    for row in range(B):
        same = ids[row][:, None] == ids[row][None, :]
        mask = attention_mask(B, length, window=window, document_ids_BS=ids).dense().view(B, length, length)[row]
        assert torch.equal(mask, (j <= i) & (j > i - window) & same)
        full = attention_mask(B, length, document_ids_BS=ids).dense().view(B, length, length)[row]
        assert torch.equal(full, (j <= i) & same)


def test_a_sliding_layer_costs_its_window_and_a_packed_layer_its_documents() -> None:
    length, window = 4096, 512
    sliding = attention_mask(1, length, window=window)
    area = sum((b.query_end - b.query_start) * (b.key_end - b.key_start) for b in sliding.blocks)
    assert area <= length * (window + BLOCK_SIZE)
    ids = (torch.arange(length) // 256)[None]
    packed = attention_mask(1, length, document_ids_BS=ids)
    assert sum((b.query_end - b.query_start) * (b.key_end - b.key_start) for b in packed.blocks) <= length * 256
    few = sliding.select(torch.tensor([5, 4000]))
    assert len(few.blocks) == 2 and sum(b.key_end - b.key_start for b in few.blocks) <= 2 * window


def test_no_queries_need_no_kernel_but_keep_their_gradients() -> None:
    """A rank whose batch has no image, or no supervised token: every kernel is passed by, every gradient is there."""
    q, k, v = (torch.randn(n, K * g, H, requires_grad=True) for n, g in ((0, G), (2 * 5, 1), (2 * 5, 1)))
    mask = attention_mask(2, 5).select(torch.zeros(0, dtype=torch.long))
    out = attention(q, k, v, mask)
    assert out.shape == (0, K * G, H)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(not grad.any() for grad in grads)
    empty = segment_mask(())
    assert attention(q, k[:0], v[:0], empty).shape == (0, K * G, H)


def test_vision_runs_are_seen_both_ways_within_window_and_document() -> None:
    vision = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 1, 1]]).bool()
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    dense = attention_mask(1, 10, window=3, document_ids_BS=documents, vision_BS=vision).dense()
    runs = [range(1, 4), range(5, 6), range(6, 7), range(8, 10)]
    for i in range(10):
        for j in range(10):
            together = any(i in run and j in run for run in runs)
            same = documents[0, i] == documents[0, j]
            assert dense[i, j] == bool((j <= i or together) and j > i - 3 and same), (i, j)
