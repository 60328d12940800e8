"""Sizes of the image and audio encoders: towers (E2B, E4B, 26B-A4B, 31B) and plain embedders (12B).

Field names are those of the released `config.json`; defaults are the values all releases share.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

ENCODERS = {
    "vision": ("vision_tower", "vision_embedder", "embed_vision"),
    "audio": ("audio_tower", "embed_audio"),
}
"""The modules of a `Gemma4` that only media of a kind touch; a variant has those that its sizes ask for."""
ENCODER_MODULES = tuple(chain(*ENCODERS.values()))
LAYER_STACKS = ("vision_tower.encoder", "audio_tower")
"""Where a tower has its `layers`."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision transformer over 16 x 16 patches, pooled 3 x 3 into soft tokens (docs/gemma4.md 8.1)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10_240
    use_clipped_linears: bool = False
    standardize: bool = False
    rope_theta: float = 100.0
    rms_norm_eps: float = 1e-6
    soft_tokens: int = 280

    @property
    def num_positions(self) -> int:
        """Positions along each side of an image."""
        return self.position_embedding_size

    @property
    def module(self) -> str | None:
        """The module before the projector."""
        return "vision_tower"

    @property
    def patch_width(self) -> int:
        """Numbers in one patch."""
        return 3 * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Patches that are pooled into one soft token."""
        return self.pooling_kernel_size**2

    @property
    def output_size(self) -> int:
        """Width of the soft tokens before they are projected to the text stream."""
        return self.hidden_size


@dataclass(frozen=True, kw_only=True)
class VisionEmbedderConfig:
    """12B: merged 48 x 48 patches through three layer norms and a linear map (docs/gemma4.md 8.2)."""

    mm_embed_dim: int
    patch_size: int = 16
    pooling_kernel_size: int = 3
    mm_posemb_size: int = 1120
    rms_norm_eps: float = 1e-6
    soft_tokens: int = 280

    @property
    def num_positions(self) -> int:
        """Positions along each side of an image."""
        return self.mm_posemb_size

    @property
    def module(self) -> str | None:
        """The module before the projector."""
        return "vision_embedder"

    @property
    def patch_width(self) -> int:
        """Numbers in one merged patch."""
        return 3 * (self.patch_size * self.pooling_kernel_size) ** 2

    @property
    def patches_per_token(self) -> int:
        """One: patches come merged from the processor."""
        return 1

    @property
    def output_size(self) -> int:
        """Width of the soft tokens before they are projected to the text stream."""
        return self.mm_embed_dim


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Conformer over log-mel frames, one soft token for four frames (docs/gemma4.md 9.1)."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    subsampling_conv_channels: tuple[int, int] = (128, 32)
    conv_kernel_size: int = 5
    residual_weight: float = 0.5
    attention_chunk_size: int = 12
    attention_context_left: int = 13
    """A frame attends to itself and the `attention_context_left - 2` frames before it."""
    attention_context_right: int = 0
    attention_logit_cap: float = 50.0
    attention_invalid_logits_value: float = -1e9
    use_clipped_linears: bool = True
    rms_norm_eps: float = 1e-6
    gradient_clipping: float = 1e10
    output_proj_dims: int = 1536

    @property
    def module(self) -> str | None:
        """The module before the projector."""
        return "audio_tower"

    @property
    def frame_width(self) -> int:
        """Mel filters of one frame: as many as the first convolution has channels."""
        return self.subsampling_conv_channels[0]

    @property
    def output_size(self) -> int:
        """Width of the soft tokens before they are projected to the text stream."""
        return self.output_proj_dims

    @property
    def window(self) -> int:
        """Frames a frame attends to, itself included."""
        return self.attention_context_left - 1

    def num_tokens(self, frames: int) -> int:
        """Soft tokens of a clip of so many valid frames: two halvings, rounded up."""
        return ((frames + 1) // 2 + 1) // 2


@dataclass(frozen=True, kw_only=True)
class AudioEmbedderConfig:
    """12B: frames of 640 waveform samples, normed and mapped (docs/gemma4.md 9.3)."""

    audio_embed_dim: int = 640
    rms_norm_eps: float = 1e-6

    @property
    def module(self) -> str | None:
        """None: there is nothing but the projector."""
        return None

    @property
    def frame_width(self) -> int:
        """Samples of the waveform in one frame."""
        return self.audio_embed_dim

    @property
    def output_size(self) -> int:
        """Width of the soft tokens before they are projected to the text stream."""
        return self.audio_embed_dim

    def num_tokens(self, frames: int) -> int:
        """Soft tokens of a clip: one for each frame."""
        return frames
