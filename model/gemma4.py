"""Gemma 4 as one function on one device: embed, scatter media, decode, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.audio import AudioTower
from model.config import Gemma4Config, LayerType
from model.decoder import DecoderLayer, KeyValueStore, LayerContext, decode
from model.head import Head
from model.init import init_parameters
from model.masks import AttentionMask, layer_masks
from model.media import TEXT, Media, token_types
from model.media_config import AudioConfig, VisionConfig
from model.norm import RMSNorm
from model.per_layer_embedding import per_layer_inputs, scaled_embedding
from model.rope import rotary_table
from model.stream import Rows, Stream
from model.vision import MediaProjector, VisionEmbedder, VisionTower

ENCODERS = ("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio")
"""Parts of a `Gemma4` that only batches with media touch."""


class TextDecoder(nn.Module):
    """Embedding tables, decoder layers and final norm; module names are those of the released checkpoints."""

    embed_tokens: nn.Module
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
        self.stream = Stream()
        self.head = Head(config.final_logit_softcapping)
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
        reach those outputs is skipped, exactly (docs/gemma4.md 7.3). media: what image, video and audio tokens stand
        for; such a token without media is embedded as padding. `masks` and `store` are for decoding with a
        cache: keys then come from `store`, and the masks say which are visible.
        """
        text, config = self.language_model, self.config
        num_rows, length = tokens_BS.shape
        types_BS = token_types(config, tokens_BS)
        if masks is None:
            masks = layer_masks(config, types_BS, document_ids)
        rows = None if supervised is None else self.stream.rows(supervised)
        # The last layer that makes keys and values (of all, where no layers share them): past it, only positions whose
        # output is wanted can still reach the loss.
        narrow_at = config.first_kv_shared_layer - 1
        x_TD, per_layer = self.embed(tokens_BS, types_BS, media, rows, narrow_at)
        contexts, narrowed = self.contexts(masks, positions, rows, x_TD.dtype)
        x_TD, _ = decode(text.layers, x_TD, per_layer, contexts, narrowed, rows, narrow_at, store=store)
        x_TD = text.norm(x_TD)
        if rows is None:
            return x_TD.unflatten(0, (num_rows, length))
        # A plan may have padded the rows to divide among ranks; what is cut off is copied, so that no view is returned.
        return x_TD if len(x_TD) == rows.count else x_TD[: rows.count].clone()

    def embed(
        self, tokens_BS: Tensor, types_BS: Tensor, media: Media | None, rows: Rows | None, narrow_at: int
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The stream [T, D] that enters the first layer, and each layer's own input if the variant has them."""
        text, config = self.language_model, self.config
        tokens_T = tokens_BS.masked_fill(types_BS != TEXT, config.pad_token_id).flatten()
        x_TD = scaled_embedding(tokens_T, text.embed_tokens, config.hidden_size)
        if media is not None:
            x_TD = self._scatter(x_TD, media)
        if not config.hidden_size_per_layer_input:
            return x_TD, None
        return x_TD, per_layer_inputs(
            tokens_T,
            x_TD,
            text.embed_tokens_per_layer,
            text.per_layer_model_projection,
            text.per_layer_projection_norm,
            config.num_hidden_layers,
            rows,
            narrow_at,
        )

    def contexts(
        self, masks: dict[LayerType, AttentionMask], positions: Tensor | None, rows: Rows | None, dtype: torch.dtype
    ) -> tuple[dict[LayerType, LayerContext], dict[LayerType, LayerContext]]:
        """What layers of each attention type get, before and after the stream narrows to `rows`."""
        contexts: dict[LayerType, LayerContext] = {}
        narrowed: dict[LayerType, LayerContext] = {}
        for kind, mask in masks.items():
            positions_T = mask.position_T if positions is None else positions.flatten()
            table = rotary_table(self.config, kind, positions_T, dtype)
            contexts[kind] = LayerContext(table, table, mask)
            if rows is not None:
                narrowed[kind] = LayerContext(table, table.select(rows.index), mask.select(rows.index))
        return contexts, narrowed

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped scores [..., V] in the model's dtype (docs/gemma4.md 7.1)."""
        return self.head.logits(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]: the token table itself, unscaled."""
        weight = self.language_model.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return weight

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise in place (docs/gemma4.md 12); a function of the generator's seed alone."""
        init_parameters(self, generator.initial_seed(), self.config.initializer_range, self.config.pad_token_id)

    def _scatter(self, x_TD: Tensor, media: Media) -> Tensor:
        """The stream with the soft tokens of images and sound for their placeholders, unscaled (docs/gemma4.md 8.4)."""
        if media.vision is not None:
            encoder = self.vision_tower if isinstance(self.config.vision, VisionConfig) else self.vision_embedder
            x_TD = self.stream.place(x_TD, media.vision.rows, self.embed_vision(encoder(media.vision)))
        if media.audio is not None:
            encoded = media.audio.values_TF
            if isinstance(self.config.audio, AudioConfig):
                encoded = self.audio_tower(media.audio)
            x_TD = self.stream.place(x_TD, media.audio.rows, self.embed_audio(encoded))
        return x_TD
