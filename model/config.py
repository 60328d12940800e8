"""Sizes of a Gemma 4, and what follows from them for each layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model.encoders.config import AudioConfig, AudioEmbedderConfig, VisionConfig, VisionEmbedderConfig
from model.errors import ConfigError
from model.hf.config import config_to_hf, fields_from_hf, read_json
from model.variants import variant_fields

LayerType = Literal["sliding_attention", "full_attention"]


_ENCODER_CLASSES: dict[str, tuple[type, ...]] = {
    "vision": (VisionConfig, VisionEmbedderConfig),
    "audio": (AudioConfig, AudioEmbedderConfig),
}
_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "sliding_window",
    "sliding_window_pattern",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class LayerConfig:
    """Sizes of one decoder layer.

    `kv_source` is the layer whose keys and values this one uses: itself, or, for a KV
    consumer, the last producer of the same type.
    """

    index: int
    type: LayerType
    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    kv_source: int
    kv_is_shared: bool
    """Whether a consumer reads this layer's keys and values."""
    k_eq_v: bool
    window: int | None

    @property
    def is_kv_consumer(self) -> bool:
        """Whether an earlier layer makes the keys and values that this one reads."""
        return self.kv_source != self.index


class MoESizes(NamedTuple):
    """A mixture of experts: how many, how many of them a token chooses, and the width of each."""

    num_experts: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class Gemma4Config:
    """Gemma 4: the text decoder, and its encoders if it has any; names are those of the released `config.json`.

    Raises `ConfigError` when sizes do not fit together.
    """

    vocab_size: int = 262_144
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_global_key_value_heads: int | None = None
    """KV heads of full-attention layers; None means `num_key_value_heads`. Used only with `attention_k_eq_v`."""
    head_dim: int = 256
    global_head_dim: int = 512
    sliding_window: int
    """Keys a sliding layer sees, the query's own position included."""
    sliding_window_pattern: int = 6
    """Every n-th layer, and always the last, is a full-attention layer."""
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 262_144
    enable_moe_block: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0
    partial_rotary_factor: float = 0.25
    final_logit_softcapping: float = 30.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 131_072
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    use_bidirectional_attention: str | None = None
    """"vision": on sliding layers the soft tokens of an image or frame see each other both ways; None: never."""
    boi_token_id: int = 255_999
    boa_token_id: int = 256_000
    image_token_id: int = 258_880
    audio_token_id: int = 258_881
    eoi_token_id: int = 258_882
    eoa_token_id: int = 258_883
    video_token_id: int = 258_884
    vision: VisionConfig | VisionEmbedderConfig | None = None
    audio: AudioConfig | AudioEmbedderConfig | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 0:
                raise ConfigError(f"model.{field.name}={value} is negative; sizes start at 1.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1.")
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ConfigError(f"model.{name}={getattr(self, name)} lies outside vocab_size={self.vocab_size}.")
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            kv_heads = getattr(self, name)
            if kv_heads is not None and (kv_heads < 1 or self.num_attention_heads % kv_heads):
                raise ConfigError(
                    f"model.{name}={kv_heads} does not divide num_attention_heads={self.num_attention_heads}; "
                    f"legal here: {divisors(self.num_attention_heads)}."
                )
        if self.use_bidirectional_attention not in (None, "vision"):
            raise ConfigError(
                f"model.use_bidirectional_attention={self.use_bidirectional_attention} makes no decoder; "
                "legal: vision, null."
            )
        for name in ("head_dim", "global_head_dim"):
            if getattr(self, name) % 2 or getattr(self, name) < 2:
                near = max(2, getattr(self, name) // 2 * 2)
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} is not even, which rotary embedding needs; nearest: {near}."
                )
        if self.num_kv_shared_layers:
            producers = set(self.layer_types[: self.first_kv_shared_layer])
            if producers != set(self.layer_types):
                most = self.num_hidden_layers - self.sliding_window_pattern
                raise ConfigError(
                    f"model.num_kv_shared_layers={self.num_kv_shared_layers} leaves no layer of each attention type "
                    f"to make keys and values for the rest; largest legal here: {max(most, 0)}."
                )
        if self.enable_moe_block:
            for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
                if not getattr(self, name):
                    raise ConfigError(f"model.enable_moe_block=true needs model.{name}, which is not set.")
            if self.moe is not None and self.moe.top_k > self.moe.num_experts:
                raise ConfigError(
                    f"model.top_k_experts={self.top_k_experts} exceeds num_experts={self.num_experts}; "
                    f"largest legal here: {self.num_experts}."
                )

    @property
    def layer_types(self) -> tuple[LayerType, ...]:
        """Attention of each layer: full at the end of each sliding window pattern and in the last, else sliding."""
        last = self.num_hidden_layers - 1
        return tuple(
            "full_attention" if (i + 1) % self.sliding_window_pattern == 0 or i == last else "sliding_attention"
            for i in range(self.num_hidden_layers)
        )

    @property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer that makes no keys and values; `num_hidden_layers` if all do."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @property
    def moe(self) -> MoESizes | None:
        """Sizes of the mixture of experts, if the variant has one."""
        if not self.enable_moe_block:
            return None
        assert self.num_experts and self.top_k_experts and self.moe_intermediate_size
        return MoESizes(self.num_experts, self.top_k_experts, self.moe_intermediate_size)

    @property
    def sees_images_both_ways(self) -> bool:
        """Whether, on sliding layers, the soft tokens of one image see each other both ways."""
        return self.vision is not None and self.use_bidirectional_attention == "vision"

    def layer(self, index: int) -> LayerConfig:
        """Sizes of one decoder layer, worked out of the model's."""
        types = self.layer_types
        full = types[index] == "full_attention"
        first = self.first_kv_shared_layer
        consumer, consumed = index >= first, types[index] in types[first:]
        last_producer = max((i for i in range(first) if types[i] == types[index]), default=index)
        k_eq_v = full and self.attention_k_eq_v
        kv_heads = self.num_key_value_heads
        if k_eq_v and self.num_global_key_value_heads is not None:
            kv_heads = self.num_global_key_value_heads
        return LayerConfig(
            index=index,
            type=types[index],
            head_dim=self.global_head_dim if full else self.head_dim,
            num_kv_heads=kv_heads,
            intermediate_size=self.intermediate_size * (2 if consumer and self.use_double_wide_mlp else 1),
            kv_source=last_producer if consumer else index,
            kv_is_shared=consumed and index == last_producer,
            k_eq_v=k_eq_v,
            window=None if full else self.sliding_window,
        )

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Gemma4Config:
        """Config of a registered variant, e.g. `gemma4_31b` (`gemma4_` may be left out).

        Raises `ConfigError` naming the nearest variant if there is none of that name.
        """
        return cls(**(variant_fields(name) | overrides))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Gemma4Config:
        """The inverse of `dataclasses.asdict`, also after a pass through JSON."""
        fields = dict(fields)
        for name, kinds in _ENCODER_CLASSES.items():
            if isinstance(fields.get(name), dict):
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields[name].items()}
                kind = next(kind for kind in kinds if {f.name for f in dataclasses.fields(kind)} == values.keys())
                fields[name] = kind(**values)
        return cls(**fields)

    @classmethod
    def from_hf(cls, source: Path | str | dict[str, Any]) -> Gemma4Config:
        """Config of a checkpoint folder or of its `config.json` as a dict, in either spelling."""
        raw = source if isinstance(source, dict) else read_json(Path(source) / "config.json")
        try:
            return cls(**fields_from_hf(raw))
        except ConfigError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(f"config.json has a value of the wrong kind ({error!r}); fetch it again.") from None

    def to_hf(self) -> dict[str, Any]:
        """`config.json` as a dict, in both spellings."""
        return config_to_hf(self)

    def replace(self, **overrides: Any) -> Gemma4Config:
        """The same config with some fields changed, and checked again."""
        return dataclasses.replace(self, **overrides)


def divisors(n: int) -> str:
    """The divisors of n as text, for error messages."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
