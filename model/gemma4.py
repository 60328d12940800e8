"""Gemma 4 as one function on one device: embed, put media in their places, decode, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from model.config import Gemma4Config
from model.decoder import DecoderLayer, KeyValueCache, decode, first_pruned
from model.encoders.audio import AudioTower
from model.encoders.config import AudioConfig, VisionConfig
from model.encoders.vision import MediaProjector, VisionEmbedder, VisionTower
from model.head import Head
from model.init import init_parameters
from model.inputs import Inputs, make_inputs
from model.media import Media
from model.norm import RMSNorm
from model.per_layer_embedding import per_layer_inputs, scaled_embedding


class TextDecoder(nn.Module):
    """Embedding tables, decoder layers and final norm; module names are those of the released checkpoints.

    With a `span` that starts later it has no tables, but that of the head; with one that ends earlier no norm.
    """

    embed_tokens: nn.Module
    embed_tokens_per_layer: nn.Module

    def __init__(self, config: Gemma4Config, span: range) -> None:
        super().__init__()
        D, P, L = config.hidden_size, config.hidden_size_per_layer_input, config.num_hidden_layers
        is_first, is_last = span.start == 0, span.stop == L
        if is_first or is_last:  # the last has it as its head
            self.embed_tokens = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, config.layer(i)) for i in span})
        if is_last:
            self.norm = RMSNorm(D, config.rms_norm_eps)
        if P and is_first:
            self.embed_tokens_per_layer = nn.Embedding(
                config.vocab_size_per_layer_input, L * P, padding_idx=config.pad_token_id
            )
            self.per_layer_model_projection = nn.Linear(D, L * P, bias=False)
            self.per_layer_projection_norm = RMSNorm(P, config.rms_norm_eps)


class Gemma4(nn.Module):
    """The model. Construct on `meta` and call `to_empty` and `init_weights`, or construct in place.

    `forward(tokens_BS)` returns hidden states [B, S, D]; `logits` and `model.head` turn them
    into soft-capped scores or a loss through the tied token table. With a `span` it has only these decoder layers,
    under the names they have in the whole, and what comes before the first or after the last of all.
    """

    plans: list[Callable[[Inputs], Inputs]]
    """What becomes of a batch's inputs before `run`, in order: nothing, on one device."""

    def __init__(self, config: Gemma4Config, span: range | None = None) -> None:
        super().__init__()
        self.config, self.plans = config, []
        self.span = span or range(config.num_hidden_layers)
        self.language_model = TextDecoder(config, self.span)
        self.head = Head(config.final_logit_softcapping)
        if self.span.start > 0:
            return
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
    ) -> Tensor:
        """Hidden states after the final norm.

        tokens, positions (default 0..S-1), document_ids: integers [B, S]; attention never
        crosses a change of document id. supervised: bool [B, S], the positions whose output
        is wanted; with it the result is [T_supervised, D], in order, and work that cannot
        reach those outputs is skipped, exactly (docs/gemma4.md 7.3). media: what image, video and audio tokens stand
        for; such a token without media is embedded as padding.
        """
        inputs = make_inputs(self.config, tokens_BS, positions, document_ids, supervised, media)
        for plan in self.plans:
            inputs = plan(inputs.to(torch.device("cpu")))
        # The bare method: hooks on this model's `run` are on its `forward` too.
        return Gemma4.run(self, inputs.to(tokens_BS.device))

    def run(self, inputs: Inputs, kv_cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states of all positions [B, S, D], or of the kept ones [t, D].

        A cache adds the keys and values of earlier tokens.
        """
        text, kept = self.language_model, inputs.kept
        x_TD, per_layer = self.embed(inputs)
        x_TD, _ = decode(self.config, self.layers, x_TD, per_layer, inputs, kv_cache=kv_cache)
        x_TD = text.norm(x_TD)
        if kept is None:
            return x_TD.unflatten(0, (inputs.batch_size, inputs.length))
        # A plan may have added places, to divide among ranks; what is cut off is copied, so that no view is returned.
        return x_TD if len(x_TD) == kept.count else x_TD[: kept.count].clone()

    def embed(self, inputs: Inputs) -> tuple[Tensor, dict[int, Tensor] | None]:
        """What enters the first layer [T, D], and each layer's own input [T, P] if the variant has them."""
        text, config, media, kept = self.language_model, self.config, inputs.media, inputs.kept
        x_TD = scaled_embedding(inputs.tokens_T, text.embed_tokens, config.hidden_size)
        if media is not None and media.vision is not None:
            encoder = self.vision_tower if isinstance(config.vision, VisionConfig) else self.vision_embedder
            x_TD = media.vision.places.put(x_TD, self.embed_vision(encoder(media.vision)))
        if media is not None and media.audio is not None:
            encoded = self.audio_tower(media.audio) if hasattr(self, "audio_tower") else media.audio.values_TF
            x_TD = media.audio.places.put(x_TD, self.embed_audio(encoded))
        if not config.hidden_size_per_layer_input:
            return x_TD, None
        return x_TD, per_layer_inputs(
            scaled_embedding(inputs.tokens_T, text.embed_tokens_per_layer, config.hidden_size_per_layer_input),
            x_TD,
            text.per_layer_model_projection,
            text.per_layer_projection_norm,
            None if kept is None else kept.take,
            first_pruned(config),
        )

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers of the span, in order; their names count from the first of the whole model."""
        return [cast(DecoderLayer, layer) for layer in self.language_model.layers.values()]

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
