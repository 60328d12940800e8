"""Sound to soft tokens: the Conformer of E2B and E4B (docs/gemma4.md 9.1, 9.2).

Clips of any length are laid end to end, without padding; attention and convolution stop at the
first frame of the query's own clip. Attention is causal over a window of a few frames, so
queries go in blocks of one window against the keys of two.

Letters of this file: T frames of all clips, D the tower's width, N heads; in attention B blocks, W the window,
C = 2 W keys of a context; in convolutions N clips, C channels, M mel; F numbers of a frame.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoders.clipped_linear import ClippedLinear
from model.encoders.clips import Clips
from model.encoders.config import AudioConfig
from model.media import Frames
from model.norm import RMSNorm
from model.precision import accumulation_dtype, upcast


class SubsampleLayer(nn.Module):
    """3 x 3 convolution of stride 2 over time and mel, norm over channels, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(out_channels, eps=eps, bias=False)

    def forward(self, x_NCTM: Tensor) -> Tensor:
        """Half as many frames and mel bins, [clips, channels, T, mel]."""
        x_NCTM = self.conv(x_NCTM.to(self.conv.weight.dtype))
        return F.relu(self.norm(x_NCTM.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class SubsampleConvProjection(nn.Module):
    """Four frames to one: two strided convolutions, then a linear map of (mel, channel)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.subsampling_conv_channels
        self.layer0 = SubsampleLayer(1, first, config.rms_norm_eps)
        self.layer1 = SubsampleLayer(first, second, config.rms_norm_eps)
        self.input_proj_linear = nn.Linear(config.frame_width // 4 * second, config.hidden_size, bias=False)

    def forward(self, values_TF: Tensor, clips: Clips) -> Tensor:
        """Flat frames to flat soft tokens; each clip is convolved as if it stood alone."""
        flat = values_TF.new_zeros(clips.count * clips.longest, values_TF.shape[1]).index_copy(
            0, clips.frames, values_TF
        )
        x_NCTM = self.layer0(flat.unflatten(0, (clips.count, clips.longest))[:, None])
        x_NCTM = self.layer1(x_NCTM * clips.halves_NT[:, None, :, None])
        x_NTD = x_NCTM.permute(0, 2, 3, 1).flatten(2)
        return self.input_proj_linear(x_NTD.flatten(0, 1)[clips.tokens])


class FeedForward(nn.Module):
    """Half-weighted feed-forward of a Conformer layer, with norms before and after, bounded against overflow."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        D, clipped = config.hidden_size, config.use_clipped_linears
        self.config = config
        self.ffw_layer_1 = ClippedLinear(D, 4 * D, clipped)
        self.ffw_layer_2 = ClippedLinear(4 * D, D, clipped)
        self.pre_layer_norm = RMSNorm(D, config.rms_norm_eps)
        self.post_layer_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The stream with this layer's share added."""
        y = self.pre_layer_norm(_bounded(x_TD, self.config))
        y = self.ffw_layer_2(F.silu(self.ffw_layer_1(y)))
        return self.post_layer_norm(_bounded(y, self.config)) * self.config.residual_weight + x_TD


class AudioAttention(nn.Module):
    """Causal attention in float32 over the last `window` frames, a learned bias by distance (docs/gemma4.md 9.2)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        D, clipped = config.hidden_size, config.use_clipped_linears
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = D // config.num_attention_heads
        self.q_proj = ClippedLinear(D, D, clipped)
        self.k_proj = ClippedLinear(D, D, clipped)
        self.v_proj = ClippedLinear(D, D, clipped)
        self.post = ClippedLinear(D, D, clipped)
        self.relative_k_proj = nn.Linear(D, D, bias=False)
        self.per_dim_scale = nn.Parameter(torch.zeros(self.head_dim))

    def forward(self, x_TD: Tensor, clips: Clips, sinusoid_WD: Tensor) -> Tensor:
        """Attended frames [T, D]; no frame sees one of another clip."""
        W, heads = self.config.window, (self.num_heads, self.head_dim)
        q, k, v = (upcast(p(x_TD)).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = q * (self.head_dim**-0.5 / math.log(2)) * F.softplus(self.per_dim_scale)
        k = k * (math.log(1 + math.e) / math.log(2))

        q_BWNH, k_BCNH, v_BCNH = _blocks(q, W), _contexts(k, W), _contexts(v, W)
        relative = self.relative_k_proj(sinusoid_WD)
        relative_WCNH = upcast(relative).unflatten(-1, heads)[clips.distance_WC.clamp(0, W - 1)]
        scores_BNWC = torch.einsum("bwnh,bcnh->bnwc", q_BWNH, k_BCNH)
        scores_BNWC = scores_BNWC + torch.einsum("bwnh,wcnh->bnwc", q_BWNH, relative_WCNH)
        cap = self.config.attention_logit_cap
        scores_BNWC = torch.tanh(scores_BNWC / cap) * cap
        scores_BNWC = scores_BNWC.masked_fill(~clips.visible_BWC[:, None], self.config.attention_invalid_logits_value)
        out_BWNH = torch.einsum("bnwc,bcnh->bwnh", scores_BNWC.softmax(dim=-1), v_BCNH)
        return self.post(out_BWNH.flatten(0, 1)[: len(x_TD)].flatten(1).to(x_TD.dtype))


class LightConv(nn.Module):
    """Gated linear unit, causal depthwise convolution over time, and back."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        D, eps, clipped = config.hidden_size, config.rms_norm_eps, config.use_clipped_linears
        self.config = config
        self.linear_start = ClippedLinear(D, 2 * D, clipped)
        self.linear_end = ClippedLinear(D, D, clipped)
        self.depthwise_conv1d = nn.Conv1d(D, D, config.conv_kernel_size, groups=D, bias=False)
        self.pre_layer_norm = RMSNorm(D, eps)
        self.conv_norm = RMSNorm(D, eps)

    def forward(self, x_TD: Tensor, clips: Clips) -> Tensor:
        """The stream with the convolution's share added; nothing leaks from clip to clip."""
        y = F.glu(self.linear_start(self.pre_layer_norm(x_TD)), dim=-1)
        y = self.conv_norm(_bounded(self._convolve(y, clips), self.config))
        return self.linear_end(F.silu(y)) + x_TD

    def _convolve(self, x_TD: Tensor, clips: Clips) -> Tensor:
        spread = x_TD.new_zeros(clips.spread, x_TD.shape[1]).index_copy(0, clips.place_T, x_TD)
        return self.depthwise_conv1d(spread.T[None])[0].T[clips.place_T - (self.config.conv_kernel_size - 1)]


class AudioLayer(nn.Module):
    """Conformer layer: attention and convolution between two feed-forwards."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.feed_forward1 = FeedForward(config)
        self.feed_forward2 = FeedForward(config)
        self.self_attn = AudioAttention(config)
        self.lconv1d = LightConv(config)
        self.norm_pre_attn = RMSNorm(D, eps)
        self.norm_post_attn = RMSNorm(D, eps)
        self.norm_out = RMSNorm(D, eps)

    def forward(self, x_TD: Tensor, clips: Clips, sinusoid_WD: Tensor) -> Tensor:
        """The stream [T, D] after this layer."""
        x_TD = self.feed_forward1(x_TD)
        attended = self.self_attn(self.norm_pre_attn(_bounded(x_TD, self.config)), clips, sinusoid_WD)
        x_TD = self.norm_post_attn(_bounded(attended, self.config)) + x_TD
        x_TD = self.feed_forward2(self.lconv1d(x_TD, clips))
        return self.norm_out(_bounded(x_TD, self.config))


class AudioTower(nn.Module):
    """Log-mel frames [T, 128] of clips to soft tokens [sum of ceil(ceil(n / 2) / 2), output_proj_dims]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample_conv_projection = SubsampleConvProjection(config)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.num_hidden_layers))
        self.output_proj = nn.Linear(config.hidden_size, config.output_proj_dims, bias=True)

    def forward(self, frames: Frames) -> Tensor:
        """Soft tokens [T / 4, output width] of log-mel frames, clips end to end."""
        assert frames.clips is not None
        x_TD = self.subsample_conv_projection(frames.values_TF, frames.clips)
        distances = torch.arange(self.config.window, device=x_TD.device)
        sinusoid_WD = sinusoid(distances, self.config.hidden_size, x_TD.dtype)
        for layer in self.layers:
            x_TD = layer(x_TD, frames.clips, sinusoid_WD)
        return self.output_proj(x_TD)


def sinusoid(distances: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Encoding of distances [W, D]: [sin(d f), cos(d f)] with f_m = 10000^(-m / (width / 2 - 1)) in float32."""
    count = width // 2
    step = math.log(10_000.0) / max(count - 1, 1)
    frequencies = torch.exp(torch.arange(count, device=distances.device) * -step)
    angles = distances[:, None] * frequencies.to(accumulation_dtype(dtype))
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype)


def _bounded(x: Tensor, config: AudioConfig) -> Tensor:
    limit = min(config.gradient_clipping, torch.finfo(x.dtype).max)
    return torch.clamp(x, -limit, limit)


def _blocks(x_TNH: Tensor, size: int) -> Tensor:
    """[T, N, H] -> [B, size, N, H], the last block filled with zeros."""
    return F.pad(x_TNH, (0, 0, 0, 0, 0, -len(x_TNH) % size)).unflatten(0, (-1, size))


def _contexts(x_TNH: Tensor, size: int) -> Tensor:
    """[T, N, H] -> [B, 2 * size, N, H]: each block after the one before it."""
    blocks = _blocks(x_TNH, size)
    before = F.pad(blocks, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
    return torch.cat((before, blocks), dim=1)
