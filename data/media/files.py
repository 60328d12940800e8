"""Media files made ready for one model: how many tokens each takes, and later its values for a sequence of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.media.audio import MELS, SAMPLES_PER_TOKEN
from data.media.features import FeatureCache
from data.media.process import MediaItem, MediaProcessor
from data.tokenizer import TokenizerError
from model import ConfigError, Gemma4Config
from model.encoders.config import AudioConfig, VisionEmbedderConfig
from model.media import MediaError

_VISION_TOKENS = {"boi": "<|image>", "image": "<|image|>", "eoi": "<image|>", "video": "<|video|>"}
_AUDIO_TOKENS = {"boa": "<|audio>", "audio": "<|audio|>", "eoa": "<audio|>"}


@dataclass(frozen=True)
class MediaFile:
    """A media part of a tokenised conversation.

    start, stop  its token range, begin and end tokens and timestamps included.
    num_tokens   media tokens in that range, num_pieces the images, frames or clips they stand for.
    sha256       digest of the file's contents when it was prepared; empty if nobody took it.
    root         which of the source's files named it; a relative path begins in that one's folder. One of a file that
                 lay inside of the source begins in the folder of the corpus (`data.media.kept`).
    """

    kind: str
    path: str
    start: int
    stop: int
    num_tokens: int
    num_pieces: int
    sha256: str = ""
    root: int = 0


def media_processor(config: Gemma4Config) -> MediaProcessor:
    """What makes media ready for this model.

    Raises `ConfigError` if the model hears features that no sound is made into, and `MediaError` for a number of soft
    tokens that is not legal.
    """
    vision, audio = config.vision, config.audio
    if audio is None:
        processor = MediaProcessor(audio_features=None)
    elif isinstance(audio, AudioConfig):
        _check_frame_width("audio.subsampling_conv_channels[0]", audio.frame_width, MELS)
        processor = MediaProcessor(audio_features="mel")
    else:
        _check_frame_width("audio.audio_embed_dim", audio.frame_width, SAMPLES_PER_TOKEN)
        processor = MediaProcessor(audio_features="waveform")
    if vision is None:
        return processor
    return replace(
        processor,
        patch_size=vision.patch_size,
        pooling_kernel_size=vision.pooling_kernel_size,
        image_tokens=vision.soft_tokens,
        merged=isinstance(vision, VisionEmbedderConfig),
    )


def check_media_tokens(tokenizer: Tokenizer, config: Gemma4Config) -> None:
    """Raises `TokenizerError` unless the tokens of media that the model can read are those of the tokenizer."""
    names = (_VISION_TOKENS if config.vision else {}) | (_AUDIO_TOKENS if config.audio else {})
    for name, token in names.items():
        found, wanted = tokenizer.token_to_id(token), getattr(config, f"{name}_token_id")
        if found is None:
            raise TokenizerError(f"the tokenizer has no {token}; set data.tokenizer to that of Gemma 4.")
        if found != wanted:
            raise TokenizerError(
                f"the tokenizer has {token} at id {found} where the model has {wanted}; "
                f"set model.{name}_token_id={found}, or data.tokenizer to that of the model."
            )


def with_media_tokens(config: Gemma4Config, tokenizer: Tokenizer) -> Gemma4Config:
    """The config with the ids that this tokenizer gives media tokens; what it does not know keeps its id."""
    ids = {name: tokenizer.token_to_id(token) for name, token in (_VISION_TOKENS | _AUDIO_TOKENS).items()}
    return config.replace(**{f"{name}_token_id": found for name, found in ids.items() if found is not None})


def measure(kind: str, path: Path, processor: MediaProcessor, config: Gemma4Config) -> MediaItem:
    """Placeholder and sizes of a file, without its values.

    Raises `MediaError` if it cannot be read, or if the model has no encoder for it.
    """
    encoder = "audio" if kind == "audio" else "vision"
    if getattr(config, encoder) is None:
        raise MediaError(
            f"the model has no encoder for the {kind} {path}; "
            f"set model.{encoder}=freeze (or train), in a variant that has one, or leave it out."
        )
    nothing = torch.zeros(0)  # a slice would keep the values alive
    return replace(_read(kind, path, processor), values=nothing, positions=nothing)


def load_media(
    files: Sequence[MediaFile], processor: MediaProcessor, corpus: Path, cache: FeatureCache | None = None
) -> tuple[tuple[tuple[Tensor, Tensor], ...], tuple[Tensor, ...]]:
    """Images, as (patches [T, C], positions [T, 2]), frames of videos among them, and clips, as frames [T, F].

    With a cache they are decoded once, and the same then. Raises `MediaError` for a file that is gone, or that takes
    other tokens than when `corpus` was prepared.
    """
    images: list[tuple[Tensor, Tensor]] = []
    clips: list[Tensor] = []
    for file in files:
        found = digest(Path(file.path)) if Path(file.path).is_file() and (file.sha256 or cache) else ""
        if file.sha256 and found and found != file.sha256:
            raise MediaError(
                f"{file.path} changed since it was prepared; put the old file back, or delete {corpus} to prepare "
                "again."
            )
        read = partial(_read, file.kind, file.path, processor)
        item = cache.item(file.kind, found, processor, read) if cache and found else read()
        if (item.num_tokens, len(item.lengths)) != (file.num_tokens, file.num_pieces):
            raise MediaError(
                f"{file.path} changed since it was prepared: {item.num_tokens} media tokens for {len(item.lengths)} "
                f"images, frames or clips, before {file.num_tokens} for {file.num_pieces}; "
                f"put the old file back, or delete {corpus} to prepare again."
            )
        images += item.images
        clips += item.clips
    return tuple(images), tuple(clips)


def digest(path: Path) -> str:
    """SHA-256 of a file's contents in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(kind: str, path: str | Path, processor: MediaProcessor) -> MediaItem:
    return {"image": processor.image, "audio": processor.audio, "video": processor.video}[kind](path)


def _check_frame_width(name: str, found: int, made: int) -> None:
    if found != made:
        raise ConfigError(f"model.{name}={found} fits no sound, which is made into {made} numbers a frame; set {made}.")
