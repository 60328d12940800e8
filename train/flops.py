"""How many floating-point operations a batch needs, and what the device could do at most.

Counting rule: two per multiply-add of every matrix product and attention score that can reach
the loss, forward once and backward twice. Exact for Gemma 4: windows and documents bound the
scores, a token counts its active experts, per-layer projections and the head are in, and work
that is skipped (unsupervised positions of KV consumers, the last layer and the head) is not.
Not counted: table look-ups, norms, rotations, softmax, recomputation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from data.batch import Batch
from model import Gemma4Config
from model.config import LayerType
from model.masks import attention_mask
from model.media import Media, is_vision, token_types
from model.media_config import AudioConfig, VisionConfig


@dataclass(frozen=True)
class Work:
    """What one batch asks for: positions, supervised positions, and visible (query, key) pairs by layer type."""

    tokens: int
    supervised: int
    pairs: dict[LayerType, int]
    supervised_pairs: dict[LayerType, int]


def batch_work(config: Gemma4Config, batch: Batch) -> Work:
    """Count a batch; reads values, so call it before the batch moves to a GPU."""
    rows = batch.supervised_BS.flatten()
    pairs: dict[LayerType, int] = {}
    supervised_pairs: dict[LayerType, int] = {}
    for kind in dict.fromkeys(config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        both_ways = kind == "sliding_attention" and config.sees_images_both_ways
        mask = attention_mask(
            *batch.tokens_BS.shape,
            window=window,
            document_ids_BS=batch.document_ids_BS,
            vision_BS=is_vision(token_types(config, batch.tokens_BS)) if both_ways else None,
        )
        visible_T = mask.last_key_T - mask.first_key_T + 1
        pairs[kind], supervised_pairs[kind] = int(visible_T.sum()), int(visible_T[rows].sum())
    return Work(batch.tokens_BS.numel(), int(rows.sum()), pairs, supervised_pairs)


def training_flops(config: Gemma4Config, work: Work) -> int:
    """Operations of forward and backward over the batch."""
    D, N, P = config.hidden_size, config.num_attention_heads, config.hidden_size_per_layer_input
    multiply_adds = work.supervised * config.vocab_size * D
    for index in range(config.num_hidden_layers):
        layer = config.layer(index)
        H, narrowed = layer.head_dim, index >= config.first_kv_shared_layer - 1
        queries = work.supervised if narrowed else work.tokens
        pairs = (work.supervised_pairs if narrowed else work.pairs)[layer.type]
        if not layer.is_kv_consumer:
            multiply_adds += work.tokens * D * layer.num_kv_heads * H * (1 if layer.k_eq_v else 2)
        per_query = 2 * D * N * H + 3 * D * layer.intermediate_size + 3 * D * P
        if config.enable_moe_block:
            assert config.num_experts and config.top_k_experts and config.moe_intermediate_size
            per_query += D * config.num_experts + 3 * D * config.moe_intermediate_size * config.top_k_experts
        multiply_adds += queries * per_query + 2 * pairs * N * H
    return 3 * 2 * multiply_adds


def media_flops(config: Gemma4Config, media: Media, frozen: tuple[str, ...] = ()) -> int:
    """Operations of the encoders and projectors over a batch's media; a frozen module goes forward only."""
    products: dict[str, int] = {}
    if media.vision is not None and config.vision is not None:
        patches, vision = len(media.vision.values_TC), config.vision
        if isinstance(vision, VisionConfig):
            D, width = vision.hidden_size, vision.num_attention_heads * vision.head_dim
            per_patch = 4 * D * width + 3 * D * vision.intermediate_size
            pairs = sum(length**2 for length in media.vision.lengths)
            layers = vision.num_hidden_layers * (patches * per_patch + 2 * pairs * width)
            products["vision_tower"] = patches * vision.patch_width * D + layers
        else:
            products["vision_embedder"] = patches * vision.patch_width * vision.mm_embed_dim
        tokens = patches // vision.patches_per_token
        products["embed_vision"] = tokens * vision.output_size * config.hidden_size
    if media.audio is not None and config.audio is not None:
        audio = config.audio
        counts = [audio.num_tokens(frames) for frames in media.audio.lengths]
        if isinstance(audio, AudioConfig):
            products["audio_tower"] = sum(
                _audio_products(audio, frames, count) for frames, count in zip(media.audio.lengths, counts, strict=True)
            )
        products["embed_audio"] = sum(counts) * audio.output_size * config.hidden_size
    return 2 * sum(count * (1 if name in frozen else 3) for name, count in products.items())


def _audio_products(audio: AudioConfig, frames: int, tokens: int) -> int:
    """Multiply-adds of the tower over one clip: convolutions, then layers over its tokens."""
    D, (first, second), mels = audio.hidden_size, audio.subsampling_conv_channels, audio.frame_width
    halves, quarter = (frames + 1) // 2, mels // 4
    convolutions = 9 * first * halves * (mels // 2) + 9 * first * second * tokens * quarter
    pairs = sum(min(i + 1, audio.window) for i in range(tokens))
    feed_forward, attention, light_conv = 16 * D * D, 4 * D * D, 3 * D * D + audio.conv_kernel_size * D
    layer = tokens * (feed_forward + attention + light_conv) + 3 * pairs * D + audio.window * D * D
    outer = tokens * (quarter * second * D + D * audio.output_proj_dims)
    return convolutions + outer + audio.num_hidden_layers * layer


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Dense peak per second: the maker's figure for a GPU in bfloat16, the best measured product for a CPU."""
    if device.type == "cuda":
        from torchtitan.tools.utils import get_peak_flops

        return float(get_peak_flops(torch.cuda.get_device_name(device)))
    size, best = 768, 0.0
    a = torch.randn(size, size, dtype=dtype)
    deadline = time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
