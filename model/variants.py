"""The registry: sizes of every released and tiny variant, as `Gemma4Config` fields that differ from its defaults.

The single source of sizes. Released numbers are those of the published weights; `tiny_*` keep
each structural feature of their parent at a size a laptop trains.
"""

from __future__ import annotations

from typing import Any

from model.encoders.config import AudioConfig, AudioEmbedderConfig, VisionConfig, VisionEmbedderConfig
from model.errors import ConfigError, nearest

_SMALL_VISION = VisionConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=16,
    num_attention_heads=12,
    head_dim=64,
    use_clipped_linears=True,
)
_LARGE_VISION = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    head_dim=72,
    standardize=True,
)
_E2B = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    "sliding_window_pattern": 5,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 256,
    "vision": _SMALL_VISION,
    "audio": AudioConfig(),
}
_E4B = {
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 42,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": 512,
    "num_kv_shared_layers": 18,
    "hidden_size_per_layer_input": 256,
    "vision": _SMALL_VISION,
    "audio": AudioConfig(),
}
_12B = {
    "hidden_size": 3840,
    "intermediate_size": 15_360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
    "sliding_window": 1024,
    "attention_k_eq_v": True,
    "max_position_embeddings": 262_144,
    "use_bidirectional_attention": "vision",
    "vision": VisionEmbedderConfig(mm_embed_dim=3840),
    "audio": AudioEmbedderConfig(),
}
_26B_A4B = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "sliding_window": 1024,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "max_position_embeddings": 262_144,
    "use_bidirectional_attention": "vision",
    "vision": _LARGE_VISION,
}
_31B = {
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "sliding_window": 1024,
    "attention_k_eq_v": True,
    "max_position_embeddings": 262_144,
    "use_bidirectional_attention": "vision",
    "vision": _LARGE_VISION,
}
_TINY = {
    "vocab_size": 8192,
    "vocab_size_per_layer_input": 8192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 64,
    "max_position_embeddings": 8192,
    # The last seven ids, as the tokenizer that is trained on the spot has them.
    "boi_token_id": 8185,
    "boa_token_id": 8186,
    "image_token_id": 8187,
    "audio_token_id": 8188,
    "eoi_token_id": 8189,
    "eoa_token_id": 8190,
    "video_token_id": 8191,
}
_TINY_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 256,
}
_TINY_SMALL = {
    "vision": VisionConfig(**_TINY_VISION, use_clipped_linears=True),
    "audio": AudioConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        subsampling_conv_channels=(128, 4),
        output_proj_dims=48,
    ),
}
_TINY_LARGE = {"vision": VisionConfig(**_TINY_VISION, standardize=True)}

_VARIANTS: dict[str, dict[str, Any]] = {
    "e2b": _E2B,
    "e4b": _E4B,
    "12b": _12B,
    "26b_a4b": _26B_A4B,
    "31b": _31B,
    "tiny_e2b": _E2B
    | _TINY
    | _TINY_SMALL
    | {"num_hidden_layers": 15, "num_kv_shared_layers": 10, "hidden_size_per_layer_input": 16},
    "tiny_e4b": _E4B | _TINY | _TINY_SMALL | {"num_kv_shared_layers": 6, "hidden_size_per_layer_input": 16},
    "tiny_12b": _12B
    | _TINY
    | {"num_key_value_heads": 4, "vision": VisionEmbedderConfig(mm_embed_dim=64, mm_posemb_size=256)},
    "tiny_26b_a4b": _26B_A4B
    | _TINY
    | _TINY_LARGE
    | {
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "intermediate_size": 128,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 64,
    },
    "tiny_31b": _31B | _TINY | _TINY_LARGE | {"num_key_value_heads": 4, "num_global_key_value_heads": 1},
}
# Base and instruction-tuned releases share one architecture.
_VARIANTS |= {f"{name}_it": _VARIANTS[name] for name in ("e2b", "e4b", "12b", "26b_a4b", "31b")}

HUB_IDS: dict[str, str] = {
    f"gemma4_{name}{suffix.lower().replace('-', '_')}": f"google/gemma-4-{released}{suffix}"
    for name, released in (("e2b", "E2B"), ("e4b", "E4B"), ("12b", "12B"), ("26b_a4b", "26B-A4B"), ("31b", "31B"))
    for suffix in ("", "-it")
}
"""Where the weights of the registered names are published."""

VARIANT_NAMES: tuple[str, ...] = tuple(f"gemma4_{name}" for name in _VARIANTS)


def variant_fields(name: str) -> dict[str, Any]:
    """Config fields of a registered variant that differ from `Gemma4Config`'s defaults."""
    key = name.removeprefix("gemma4_")
    if key not in _VARIANTS:
        near = nearest(f"gemma4_{key}", VARIANT_NAMES)
        raise ConfigError(
            f"model.name={name} is no Gemma 4 variant; nearest: {near} (all: {', '.join(VARIANT_NAMES)})."
        )
    return dict(_VARIANTS[key])
