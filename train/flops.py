"""How many floating-point operations a batch needs, and what the device could do at most.

Counting rule: two per multiply-add of every matrix product and attention score that can reach
the loss, forward once and backward twice. Exact for Gemma 4: windows and documents bound the
scores, a token counts its active experts, per-layer projections and the head are in, and work
that is skipped (unsupervised positions, from the last layer that makes keys on) is not.
Not counted: table look-ups, norms, rotations, softmax, recomputation.
"""

from __future__ import annotations

import time

import torch

from model import Gemma4Config
from model.costs import layer_costs
from model.decoder import first_pruned
from model.encoders.config import AudioConfig, VisionConfig
from model.inputs import Inputs
from model.masks import AttentionMask
from model.media import Media


def training_flops(config: Gemma4Config, inputs: Inputs) -> int:
    """Operations of forward and backward over a batch; reads values, so call it before the batch moves to a GPU."""
    assert inputs.kept is not None
    tokens, kept = len(inputs.tokens_T), inputs.kept.count
    all_pairs, kept_pairs = (
        {layer_type: _pairs(mask) for layer_type, mask in masks.items()} for masks in (inputs.masks, inputs.kept.masks)
    )
    multiply_adds = kept * config.vocab_size * config.hidden_size
    for index, layer_type in enumerate(config.layer_types):
        costs = layer_costs(config, index)
        pruned = index >= first_pruned(config)
        queries, pairs = (kept, kept_pairs[layer_type]) if pruned else (tokens, all_pairs[layer_type])
        multiply_adds += tokens * costs.key + queries * costs.query + pairs * costs.pair
    return 3 * 2 * multiply_adds


def _pairs(mask: AttentionMask) -> int:
    """Visible (query, key) pairs."""
    return int((mask.last_key_T - mask.first_key_T + 1).sum())


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
