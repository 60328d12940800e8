"""Gemma 4 as one function on one device: embed, scatter media, decode, head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio import AudioTower
from model.config import Gemma4Config, LayerType
from model.decoder import DecoderLayer, KeyValueStore, LayerContext, decode
from model.head import softcapped_logits
from model.init import init_parameters
from model.masks import AttentionMask, attention_mask
from model.media import TEXT, Media, is_vision, token_types
from model.media_config import AudioConfig, VisionConfig
from model.norm import RMSNorm
from model.per_layer_embedding import per_layer_inputs, scaled_embedding
from model.rope import rotary_table
from model.vision import MediaProjector, VisionEmbedder, VisionTower


class TextDecoder(nn.Module):
    """Embedding tables, decoder layers and final norm; module names are those of the released checkpoints."""

    embed_tokens_per_layer: nn.Module

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config = config
        D, P, L = config.hidden_size, config.hidden_size_per_layer_input, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, config.layer(i)) for i in range(L))
        self.norm = RMSNorm(D, config.rms_norm_eps)
        if P:
            self.embed_tokens_per_layer = nn.Embedding(
                config.vocab_size_per_layer_input, L * P, padding_idx=config.pad_token_id
            )
            self.per_layer_model_projection = nn.Linear(D, L * P, bias=False)
            self.per_layer_projection_norm = RMSNorm(P, config.rms_norm_eps)


class Gemma4(nn.Module):
    """The model. Construct on `meta` and call `to_empty` and `init_weights`, or construct in place.

    `forward(tokens_BS)` returns hidden states [B, S, D]; `logits` and `model.head` turn them
    into soft-capped scores or a loss through the tied token table.
    """

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextDecoder(config)
        vision, audio = config.vision, config.audio
        if isinstance(vision, VisionConfig):
            self.vision_tower = VisionTower(vision)
        elif vision is not None:
            self.vision_embedder = VisionEmbedder(vision)
        if vision is not None:
            self.embed_vision = MediaProjector(vision.output_size, config.hidden_size, vision.rms_norm_eps)
        if isinstance(audio, AudioConfig):
            self.audio_tower = AudioTower(audio)
        if audio is not None:
            self.embed_audio = MediaProjector(audio.output_size, config.hidden_size, audio.rms_norm_eps)

    def forward(
        self,
        tokens_BS: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        supervised: Tensor | None = None,
        *,
        media: Media | None = None,
        masks: dict[LayerType, AttentionMask] | None = None,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        tokens, positions (default 0..S-1), document_ids: integers [B, S]; attention never
        crosses a change of document id. supervised: bool [B, S], the positions whose output
        is wanted; with it the result is [T_supervised, D], in order, and work that cannot
        reach those outputs is skipped, exactly. media: what image, video and audio tokens stand
        for; such a token without media is embedded as padding. `masks` and `store` are for decoding with a
        cache: keys then come from `store`, and the masks say which are visible.
        """
        text, config = self.language_model, self.config
        num_rows, length = tokens_BS.shape
        device = tokens_BS.device
        if positions is None:
            positions = torch.arange(length, device=device).expand(num_rows, length)
        types_BS = token_types(config, tokens_BS)
        if masks is None:
            masks = self._masks(types_BS, document_ids)
        rows = None if supervised is None else supervised.flatten().nonzero()[:, 0]

        tokens_T = tokens_BS.masked_fill(types_BS != TEXT, config.pad_token_id).flatten()
        x_TD = scaled_embedding(tokens_T, text.embed_tokens, config.hidden_size)
        if media is not None:
            x_TD = self._scatter(x_TD, media)
        per_layer = None
        if config.hidden_size_per_layer_input:
            per_layer = per_layer_inputs(
                tokens_T,
                x_TD,
                text.embed_tokens_per_layer,
                text.per_layer_model_projection,
                text.per_layer_projection_norm,
                config.num_hidden_layers,
                rows,
                config.first_kv_shared_layer - 1,
            )
        contexts: dict[LayerType, LayerContext] = {}
        supervised_contexts: dict[LayerType, LayerContext] = {}
        for kind, mask in masks.items():
            table = rotary_table(config, kind, positions.flatten(), x_TD.dtype)
            contexts[kind] = LayerContext(table, table, mask)
            if rows is not None:
                supervised_contexts[kind] = LayerContext(table, table.select(rows), mask.select(rows))
        x_TD = decode(
            text.layers,
            x_TD,
            per_layer,
            contexts,
            supervised_contexts,
            rows,
            config.first_kv_shared_layer,
            store,
        )
        x_TD = text.norm(x_TD)
        return x_TD if rows is not None else x_TD.unflatten(0, (num_rows, length))

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped scores [..., V] in the model's dtype."""
        return softcapped_logits(F.linear(hidden, self.head_weight), self.config.final_logit_softcapping)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]: the token table itself, unscaled."""
        return self.language_model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise in place (architecture.md section 8); a function of the generator's seed alone."""
        init_parameters(self, generator.initial_seed(), self.config.initializer_range, self.config.pad_token_id)

    def _scatter(self, x_TD: Tensor, media: Media) -> Tensor:
        """The stream with the soft tokens of images and sound in place of their placeholders, unscaled."""
        if media.vision is not None:
            encoder = self.vision_tower if isinstance(self.config.vision, VisionConfig) else self.vision_embedder
            x_TD = x_TD.index_copy(0, media.vision.rows, self.embed_vision(encoder(media.vision)).to(x_TD.dtype))
        if media.audio is not None:
            encoded = media.audio.values_TF
            if isinstance(self.config.audio, AudioConfig):
                encoded = self.audio_tower(media.audio)
            x_TD = x_TD.index_copy(0, media.audio.rows, self.embed_audio(encoded).to(x_TD.dtype))
        return x_TD

    def _masks(self, types_BS: Tensor, document_ids: Tensor | None) -> dict[LayerType, AttentionMask]:
        """Causal; on sliding layers of 12B, 26B and 31B an image's soft tokens see each other both ways."""
        config = self.config
        masks: dict[LayerType, AttentionMask] = {}
        for kind in dict.fromkeys(config.layer_types):
            sliding = kind == "sliding_attention"
            masks[kind] = attention_mask(
                *types_BS.shape,
                window=config.sliding_window if sliding else None,
                document_ids_BS=document_ids,
                vision_BS=is_vision(types_BS) if sliding and config.sees_images_both_ways else None,
                device=types_BS.device,
            )
        return masks
