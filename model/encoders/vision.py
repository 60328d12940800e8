"""Images to soft tokens: the vision tower, and the 12B's embedder that has none (docs/gemma4.md 8).

Both take patches of any number of images laid end to end, without padding; attention stays
inside an image because every query's key interval is its own image. T counts patches, D is the
encoder's width, and C the width of what a projector takes or, in `values_TC`, of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention_kernels import attention
from model.encoders.clipped_linear import ClippedLinear
from model.encoders.config import VisionConfig, VisionEmbedderConfig
from model.masks import AttentionMask
from model.media import Patches
from model.norm import RMSNorm
from model.precision import accumulation_dtype, upcast
from model.rope import RotaryTable, apply_axial_rotary, axial_rotary_table


class PatchEmbedder(nn.Module):
    """Linear map of pixels in [-1, 1] plus one learned vector for the column and one for the row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(config.patch_width, config.hidden_size, bias=False)
        self.position_embedding_table = nn.Parameter(torch.ones(2, config.position_embedding_size, config.hidden_size))

    def forward(self, patches: Patches) -> Tensor:
        """Projected patches [T, D] with the embeddings of their columns and rows."""
        dtype = self.input_proj.weight.dtype
        values_TC = patches.values_TC.to(accumulation_dtype(dtype))
        x_TD = self.input_proj((2 * (values_TC - 0.5)).to(dtype))
        columns, rows = patches.positions_T2.unbind(dim=-1)
        x_table, y_table = self.position_embedding_table
        return x_TD + (F.embedding(columns, x_table) + F.embedding(rows, y_table))


class VisionAttention(nn.Module):
    """Attention both ways within an image, with rotary positions along both axes."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D, width, clipped = config.hidden_size, config.num_attention_heads * config.head_dim, config.use_clipped_linears
        self.head_dim = config.head_dim
        self.q_proj = ClippedLinear(D, width, clipped)
        self.k_proj = ClippedLinear(D, width, clipped)
        self.v_proj = ClippedLinear(D, width, clipped)
        self.o_proj = ClippedLinear(width, D, clipped)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.v_norm = RMSNorm(config.head_dim, config.rms_norm_eps, with_scale=False)

    def forward(self, x_TD: Tensor, table: RotaryTable, mask: AttentionMask) -> Tensor:
        """Attended patches [T, D]; no patch sees one of another image."""
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_axial_rotary(self.q_norm(q), table), apply_axial_rotary(self.k_norm(k), table)
        return self.o_proj(attention(q, k, self.v_norm(v), mask).flatten(1))


class VisionMLP(nn.Module):
    """Gated feed-forward of the vision tower, with clipped linear maps where the variant has them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D, F_, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippedLinear(D, F_, clipped)
        self.up_proj = ClippedLinear(D, F_, clipped)
        self.down_proj = ClippedLinear(F_, D, clipped)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Features [T, D] of each patch, through the gate."""
        return self.down_proj(F.gelu(self.gate_proj(x_TD), approximate="tanh") * self.up_proj(x_TD))


class VisionLayer(nn.Module):
    """Transformer layer of the vision tower, with norms before and after each half."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)

    def forward(self, x_TD: Tensor, table: RotaryTable, mask: AttentionMask) -> Tensor:
        """The stream [T, D] after this layer."""
        attended = self.self_attn(self.input_layernorm(x_TD), table, mask)
        x_TD = x_TD + self.post_attention_layernorm(attended)
        return x_TD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_TD)))


class VisionEncoder(nn.Module):
    """The layers of the vision tower, under their name in released checkpoints."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """Patches [T, 3 * patch_size^2] to soft tokens [T / pool^2, D] (docs/gemma4.md 8.1)."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))

    def forward(self, patches: Patches) -> Tensor:
        """Soft tokens [T / pool^2, D] of patches, images end to end."""
        config = self.config
        x_TD = self.patch_embedder(patches)
        table = axial_rotary_table(config.head_dim, config.rope_theta, patches.positions_T2, x_TD.dtype)
        for layer in self.encoder.layers:
            x_TD = layer(x_TD, table, patches.mask)
        # The patches of one soft token lie together; the factor sqrt(D) overflows float16, so float32 from here.
        pooled = upcast(x_TD.unflatten(0, (-1, config.patches_per_token))).mean(dim=1).to(x_TD.dtype)
        pooled = upcast(pooled) * config.hidden_size**0.5
        if config.standardize:
            pooled = (pooled - upcast(self.std_bias)) * upcast(self.std_scale)
        return pooled.to(x_TD.dtype)


class VisionEmbedder(nn.Module):
    """12B: merged patches [T, 6912] to soft tokens [T, D] (docs/gemma4.md 8.2)."""

    def __init__(self, config: VisionEmbedderConfig) -> None:
        super().__init__()
        D = config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(config.patch_width)
        self.patch_dense = nn.Linear(config.patch_width, D)
        self.patch_ln2 = nn.LayerNorm(D)
        self.pos_embedding = nn.Parameter(torch.zeros(config.mm_posemb_size, 2, D))
        self.pos_norm = nn.LayerNorm(D)

    def forward(self, patches: Patches) -> Tensor:
        """Soft tokens [T, D] of merged patches, images end to end."""
        x_TD = self.patch_ln2(self.patch_dense(self.patch_ln1(patches.values_TC.to(self.patch_dense.weight.dtype))))
        columns, rows = patches.positions_T2.unbind(dim=-1)
        x_table, y_table = self.pos_embedding.unbind(dim=1)
        return self.pos_norm(x_TD + (F.embedding(columns, x_table) + F.embedding(rows, y_table)))


class MediaProjector(nn.Module):
    """Encoder output [T, C] to the decoder's width: a norm without weight, then a linear map (docs/gemma4.md 8.3)."""

    def __init__(self, input_size: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.embedding_projection = nn.Linear(input_size, hidden_size, bias=False)
        self.embedding_pre_projection_norm = RMSNorm(input_size, eps, with_scale=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        """Soft tokens as wide as the text stream."""
        return self.embedding_projection(
            self.embedding_pre_projection_norm(x_TC.to(self.embedding_projection.weight.dtype))
        )
