"""The processor and the media tokens that a model asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from data.media.files import check_media_tokens, measure, media_processor
from data.media.process import MediaProcessor
from data.media.read import FIRST_FRAME
from data.tokenizer import TokenizerError
from model import ConfigError, Gemma4Config
from model.encoders.config import AudioConfig, AudioEmbedderConfig, VisionConfig
from tests.harness.chat_files import CONFIGS, E4B, TEXT_ONLY, TOKENIZER, chat, make, model, user


def test_the_processor_has_the_settings_of_the_model() -> None:
    assert media_processor(E4B) == MediaProcessor(image_tokens=70)
    assert media_processor(CONFIGS["gemma4_tiny_12b"]) == MediaProcessor(
        image_tokens=70, merged=True, audio_features="waveform"
    )
    assert media_processor(Gemma4Config.from_name("gemma4_31b")) == MediaProcessor(audio_features=None)
    assert isinstance(E4B.vision, VisionConfig)
    vision = replace(E4B.vision, patch_size=8, pooling_kernel_size=2)
    small = media_processor(E4B.replace(vision=vision, audio=None))
    assert small == MediaProcessor(patch_size=8, pooling_kernel_size=2, image_tokens=70, audio_features=None)
    assert media_processor(TEXT_ONLY) == MediaProcessor(audio_features=None)
    for audio, message in (
        (AudioConfig(subsampling_conv_channels=(64, 4)), r"subsampling_conv_channels\[0\]=64 .* set 128"),
        (AudioEmbedderConfig(audio_embed_dim=320), "audio_embed_dim=320 .* set 640"),
    ):
        with pytest.raises(ConfigError, match=message):
            media_processor(E4B.replace(audio=audio))


def test_media_tokens_of_tokenizer_and_model_must_agree(tmp_path: Path) -> None:
    check_media_tokens(TOKENIZER, E4B)
    check_media_tokens(TOKENIZER, E4B.replace(vision=None, image_token_id=7))
    found = TOKENIZER.token_to_id("<|image|>")
    with pytest.raises(TokenizerError, match=rf"<\|image\|> at id {found} .* has 7; set model.image_token_id={found}"):
        make(tmp_path, [chat(user(), model())], E4B.replace(image_token_id=7))
    with pytest.raises(TokenizerError, match=r"<\|audio> at id .*model.boa_token_id"):
        check_media_tokens(TOKENIZER, E4B.replace(boa_token_id=9))
    with pytest.raises(TokenizerError, match=r"has no <\|image>"):
        check_media_tokens(Tokenizer(models.BPE()), E4B)


def test_notes_outlive_the_values(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60)).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (90, 60), "red")]
    )
    found = measure("image", tmp_path / "a.gif", media_processor(E4B), E4B)
    assert found.notes == (FIRST_FRAME,) and found.num_tokens > 0 and not len(found.values)
