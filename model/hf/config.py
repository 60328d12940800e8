"""`config.json` of the released checkpoints, both spellings, to `Gemma4Config` and back.

Released files give `global_head_dim` and `num_global_key_value_heads`; transformers 5.15 and
later writes `per_layer_config` instead, its layer numbers as zero-padded strings. Both are read,
both are written (docs/gemma4.md 11.3).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.encoders.config import AudioConfig, AudioEmbedderConfig, VisionConfig, VisionEmbedderConfig
from model.errors import ConfigError, nearest

if TYPE_CHECKING:
    from model.config import Gemma4Config

TEXT_ONLY = {"gemma4_text": "Gemma4ForCausalLM", "gemma4_unified_text": "Gemma4UnifiedForCausalLM"}
"""Model types whose config is the text decoder's own, and the class that reads them."""
WHOLE = {"gemma4": "Gemma4ForConditionalGeneration", "gemma4_unified": "Gemma4UnifiedForConditionalGeneration"}

_SAME_IN_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "enable_moe_block",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "final_logit_softcapping",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "use_bidirectional_attention",
)
_NOT_IN_UNIFIED = (
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "enable_moe_block",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
)
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
)
# What the architecture fixes: a config that says otherwise is another model.
_FIXED_IN_TEXT = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}
_FIXED_IN_ENCODERS: dict[type, dict[str, Any]] = {
    VisionConfig: {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0},
    AudioConfig: {"hidden_act": "silu"},
}
_TOKEN_IDS = (
    "boi_token_id",
    "boa_token_id",
    "image_token_id",
    "audio_token_id",
    "eoi_token_id",
    "video_token_id",
)

# What transformers writes into every config, and what has no part in training or is said by the rest.
_NO_PART = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "model_type", "problem_type"),
    *("id2label", "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"),
    *("use_cache", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation"),
    *("_attn_implementation_autoset", "initializer_range", "max_position_embeddings", "tie_word_embeddings"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "quantization_config", "rope_scaling"),
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint folder. Raises `ConfigError`."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give a folder with a Gemma 4 checkpoint."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); fetch it again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object; fetch it again.")
    return raw


def fields_from_hf(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `Gemma4Config`. Raises `ConfigError` for another model, or a Gemma 4 that is not as released."""
    kind = str(raw.get("model_type"))
    if kind not in TEXT_ONLY and kind not in WHOLE:
        legal = (*WHOLE, *TEXT_ONLY)
        raise ConfigError(
            f"config.json has model_type {kind}; this reads {', '.join(legal)}; nearest: {nearest(kind, legal)}."
        )
    if raw.get("quantization_config"):
        raise ConfigError(
            "config.json has a quantization_config; only weights of 16 or 32 bits are read: give the checkpoint that "
            "is not quantised, or remove that key if these weights are not."
        )
    if not raw.get("tie_word_embeddings", True):
        raise ConfigError("config.json has tie_word_embeddings=false; every Gemma 4 ties them, and only that is built.")
    text = raw if kind in TEXT_ONLY else raw.get("text_config") or {}
    if text.get("rope_scaling"):
        raise ConfigError(
            f"config.json has rope_scaling={json.dumps(text['rope_scaling'])}; no Gemma 4 has any: give "
            "rope_parameters, or remove that key."
        )
    fields = _text_fields(text, unified=kind.startswith("gemma4_unified"))
    eos = text.get("eos_token_id", raw.get("eos_token_id", 1))
    fields["eos_token_id"] = eos[0] if isinstance(eos, list) else 1 if eos is None else eos
    fields |= {name: raw[name] for name in _TOKEN_IDS if raw.get(name) is not None}
    for name in ("eoa_token_index", "eoa_token_id"):
        if raw.get(name) is not None:
            fields["eoa_token_id"] = raw[name]
    if kind in WHOLE:
        unified = kind == "gemma4_unified"
        if raw.get("vision_config") is not None:
            fields["vision"] = _encoder(
                "vision_config", VisionEmbedderConfig if unified else VisionConfig, raw["vision_config"]
            )
        if raw.get("audio_config") is not None:
            fields["audio"] = _encoder(
                "audio_config", AudioEmbedderConfig if unified else AudioConfig, raw["audio_config"]
            )
        soft_tokens = raw.get("vision_soft_tokens_per_image")
        if soft_tokens and fields.get("vision"):
            fields["vision"] = dataclasses.replace(fields["vision"], soft_tokens=soft_tokens)
    return fields


def unread_fields(raw: dict[str, Any], config: Gemma4Config) -> list[str]:
    """Fields of the `config.json` of this model that nothing reads, those of its parts as "part.field"."""
    known = config_to_hf(config) | dict.fromkeys(_NO_PART)
    found = [name for name in raw if name not in known]
    fixed_in = {"text_config": _FIXED_IN_TEXT}
    fixed_in |= {"vision_config": _FIXED_IN_ENCODERS[VisionConfig], "audio_config": _FIXED_IN_ENCODERS[AudioConfig]}
    for section, fixed in fixed_in.items():
        part = raw.get(section)
        if isinstance(part, dict) and isinstance(known.get(section), dict):
            found += [f"{section}.{name}" for name in part if name not in {*known[section], *fixed, *_NO_PART}]
    return found


def config_to_hf(config: Gemma4Config, base: dict[str, Any] | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """`config.json` in both spellings; fields of `base` (the checkpoint a run began with) that are not ours survive."""
    unified = isinstance(config.vision, VisionEmbedderConfig) or isinstance(config.audio, AudioEmbedderConfig)
    # A quantisation of the source, and its dtype under an older name, are not what is written.
    base = {key: value for key, value in (base or {}).items() if key not in ("quantization_config", "torch_dtype")}
    whole = config.vision is not None or config.audio is not None
    text = _text_to_hf(config, unified)
    if not whole:
        kept = base if base.get("model_type") in TEXT_ONLY else {}
        kind = str(kept.get("model_type", "gemma4_text"))
        return kept | _keep_list(text, kept) | {"model_type": kind, "architectures": [TEXT_ONLY[kind]], "dtype": dtype}
    kind = "gemma4_unified" if unified else "gemma4"
    vision = audio = None
    if config.vision is not None:
        vision = dataclasses.asdict(config.vision)
        soft_tokens = vision.pop("soft_tokens")
        if unified:
            vision |= {"output_proj_dims": vision["mm_embed_dim"], "num_soft_tokens": soft_tokens}
        else:
            # Released files call it "default"; the newest reference writes "axial" and reads both.
            spelled = ((base.get("vision_config") or {}).get("rope_parameters") or {}).get("rope_type", "axial")
            rope = {"rope_type": spelled, "rope_theta": vision.pop("rope_theta")}
            vision |= {"rope_parameters": rope, "num_key_value_heads": vision["num_attention_heads"]}
            vision["default_output_length"] = soft_tokens
        vision["model_type"] = f"{kind}_vision"
    if config.audio is not None:
        audio = dataclasses.asdict(config.audio) | {"model_type": f"{kind}_audio"}
        audio = {name: list(value) if isinstance(value, tuple) else value for name, value in audio.items()}
    base_text = base.get("text_config") or {}
    ours: dict[str, Any] = {name: getattr(config, name) for name in _TOKEN_IDS} | {
        "architectures": [WHOLE[kind]],
        "model_type": kind,
        "dtype": dtype,
        "eoa_token_id": config.eoa_token_id,
        "eoa_token_index": config.eoa_token_id,
        "tie_word_embeddings": True,
        "text_config": base_text | _keep_list(text, base_text) | {"model_type": f"{kind}_text"},
        "vision_config": None if vision is None else (base.get("vision_config") or {}) | vision,
        "audio_config": None if audio is None else (base.get("audio_config") or {}) | audio,
    }
    if config.vision is not None:
        ours["vision_soft_tokens_per_image"] = config.vision.soft_tokens
    for section in ("text_config", "vision_config", "audio_config"):
        if "dtype" in (ours[section] or {}):
            ours[section]["dtype"] = dtype
    return base | ours


def _keep_list(text: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A list of end tokens that begins with ours stays a list."""
    eos = base.get("eos_token_id")
    return text | ({"eos_token_id": eos} if isinstance(eos, list) and eos[:1] == [text["eos_token_id"]] else {})


def _text_fields(text: dict[str, Any], unified: bool) -> dict[str, Any]:
    missing = [name for name in _REQUIRED if text.get(name) is None]
    if missing:
        raise ConfigError(
            f"config.json lacks {missing[0]} of the text decoder; give the config of a Gemma 4 checkpoint."
        )
    for name, value in _FIXED_IN_TEXT.items():
        if text.get(name, value) != value:
            raise ConfigError(
                f"config.json has {name}={text[name]}; every Gemma 4 has {value}, and only that is built."
            )
    fields = {name: text[name] for name in _SAME_IN_TEXT if text.get(name) is not None}
    if not fields.get("final_logit_softcapping"):
        raise ConfigError(
            "config.json has no final_logit_softcapping; every Gemma 4 has 30.0, and only a cap is built."
        )
    if unified:
        fields.setdefault("max_position_embeddings", 262_144)
        if "use_bidirectional_attention" not in text:
            fields["use_bidirectional_attention"] = "vision"
    fields.setdefault("hidden_size_per_layer_input", 0 if unified else 256)
    if unified:  # which has no such table
        fields.setdefault("vocab_size_per_layer_input", fields.get("vocab_size", 262_144))
    fields["sliding_window_pattern"] = _pattern(text, int(text["num_hidden_layers"]))
    return fields | _full_attention_fields(text, fields) | _rope_fields(text)


def _pattern(text: dict[str, Any], layers: int) -> int:
    """Period of the full-attention layers; the last layer is always one."""
    types = text.get("layer_types")
    if types is None:
        return 6
    pattern = types.index("full_attention") + 1 if "full_attention" in types else layers
    expected = [
        "full_attention" if (i + 1) % pattern == 0 or i == layers - 1 else "sliding_attention" for i in range(layers)
    ]
    if types != expected:
        raise ConfigError(
            f"config.json has layer_types that are not every {pattern}th layer full and the last; "
            "only the released pattern is built."
        )
    return pattern


def _full_attention_fields(text: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """`global_head_dim` and `num_global_key_value_heads`, from whichever spelling is there."""
    per_layer = text.get("per_layer_config")
    if per_layer is None:
        return {name: text[name] for name in ("global_head_dim", "num_global_key_value_heads") if text.get(name)}
    if not per_layer:  # full layers have the sizes of the others
        return {"global_head_dim": text.get("head_dim", 256)}
    layers = {int(index): value for index, value in per_layer.items()}
    kinds = {json.dumps(value, sort_keys=True) for value in layers.values()}
    layer_count, pattern = fields["num_hidden_layers"], fields["sliding_window_pattern"]
    full = {i for i in range(layer_count) if (i + 1) % pattern == 0 or i == layer_count - 1}
    if len(kinds) != 1 or set(layers) != full:
        raise ConfigError(
            "config.json has a per_layer_config that is not one and the same for all full layers, and only them."
        )
    one = next(iter(layers.values()))
    return {
        "global_head_dim": one.get("head_dim", text.get("head_dim", 256)),
        "num_global_key_value_heads": one.get("num_key_value_heads"),
    }


def _rope_fields(text: dict[str, Any]) -> dict[str, Any]:
    rope = text.get("rope_parameters")
    if not rope:
        return {}
    if not {"full_attention", "sliding_attention"} <= rope.keys():
        raise ConfigError("config.json has rope_parameters without full_attention and sliding_attention; give both.")
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    types = (sliding.get("rope_type", "default"), full.get("rope_type", "proportional"))
    if types != ("default", "proportional"):
        raise ConfigError(f"config.json has rope types {types}; only ('default', 'proportional') is built.")
    return {
        "rope_theta": sliding.get("rope_theta", 10_000.0),
        "global_rope_theta": full.get("rope_theta", 1_000_000.0),
        "partial_rotary_factor": full.get("partial_rotary_factor", 0.25),
    }


def _encoder(section: str, cls: type, raw: dict[str, Any]) -> Any:
    for name, value in _FIXED_IN_ENCODERS.get(cls, {}).items():
        if raw.get(name, value) != value:
            raise ConfigError(f"config.json has {section}.{name}={raw[name]}; every Gemma 4 has {value}.")
    names = [field.name for field in dataclasses.fields(cls)]
    values = {name: raw[name] for name in names if raw.get(name) is not None}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if cls is VisionConfig:
        defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12}
        values = defaults | {"head_dim": 64} | values
        heads = values["num_attention_heads"]
        if (raw.get("num_key_value_heads") or heads) != heads:
            raise ConfigError(
                f"config.json has {section}.num_key_value_heads other than num_attention_heads; not built."
            )
        theta = (raw.get("rope_parameters") or {}).get("rope_theta")
        values |= {"rope_theta": theta} if theta else {}
        values |= {"soft_tokens": raw["default_output_length"]} if raw.get("default_output_length") else {}
    if cls is VisionEmbedderConfig:
        values.setdefault("mm_embed_dim", 3840)
        if raw.get("num_soft_tokens"):
            values["soft_tokens"] = raw["num_soft_tokens"]
        if raw.get("output_proj_dims", values["mm_embed_dim"]) != values["mm_embed_dim"]:
            raise ConfigError(f"config.json has {section}.output_proj_dims other than mm_embed_dim; not built.")
    if cls is AudioConfig and values.get("attention_context_right"):
        raise ConfigError(f"config.json has {section}.attention_context_right above 0; only causal attention is built.")
    return cls(**values)


def _text_to_hf(config: Gemma4Config, unified: bool) -> dict[str, Any]:
    left_out = _NOT_IN_UNIFIED if unified else ()
    text = {name: getattr(config, name) for name in _SAME_IN_TEXT if name not in left_out}
    width = len(str(config.num_hidden_layers - 1))
    override: dict[str, Any] = {"head_dim": config.global_head_dim}
    if config.attention_k_eq_v and config.num_global_key_value_heads is not None:
        override["num_key_value_heads"] = config.num_global_key_value_heads
    full = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "full_attention"]
    return (
        text
        | _FIXED_IN_TEXT
        | {
            "eos_token_id": config.eos_token_id,
            "layer_types": list(config.layer_types),
            "global_head_dim": config.global_head_dim,
            "num_global_key_value_heads": config.num_global_key_value_heads,
            "per_layer_config": {str(i).zfill(width): override for i in full},
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": config.global_rope_theta,
                    "partial_rotary_factor": config.partial_rotary_factor,
                },
            },
        }
    )
