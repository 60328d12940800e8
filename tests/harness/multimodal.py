"""The reference with encoders: whole `transformers` models from small random configs, perturbed, written to disk."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4Config as ReferenceConfig
from transformers import Gemma4ForConditionalGeneration, Gemma4UnifiedForConditionalGeneration
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedConfig

from model import Gemma4, Gemma4Config
from model.encoders.config import AudioConfig, AudioEmbedderConfig, VisionConfig, VisionEmbedderConfig
from model.hf.weights import our_name
from model.media import Media
from tests.harness.reference import (
    random_config,
    vector_scale,
)

SOFT_TOKENS = 6
"""Budget of an image here: its padded length is this many pooled patches."""


def random_whole_config(family: str, seed: int) -> Gemma4Config:
    """`random_config` with small encoders of the family's kind; media ids are the last of the vocabulary."""
    draw = random.Random(f"whole/{family}/{seed}")
    text = random_config(family, seed)
    vision: Any
    audio: Any = None
    if family == "12b":
        vision = VisionEmbedderConfig(
            mm_embed_dim=draw.choice((24, 40)), patch_size=2, pooling_kernel_size=3, mm_posemb_size=20
        )
        audio = AudioEmbedderConfig(audio_embed_dim=draw.choice((10, 16)))
    else:
        heads = draw.choice((2, 3))
        vision = VisionConfig(
            hidden_size=draw.choice((24, 32)),
            intermediate_size=draw.choice((40, 56)),
            num_hidden_layers=2,
            num_attention_heads=heads,
            head_dim=draw.choice((8, 12)),
            patch_size=2,
            pooling_kernel_size=draw.choice((2, 3)),
            position_embedding_size=30,
            use_clipped_linears=family in ("e2b", "e4b"),
            standardize=family not in ("e2b", "e4b"),
        )
    if family in ("e2b", "e4b"):
        audio = AudioConfig(
            hidden_size=draw.choice((16, 24)),
            num_hidden_layers=2,
            num_attention_heads=2,
            subsampling_conv_channels=(16, 4),
            output_proj_dims=draw.choice((20, 28)),
        )
    top = text.vocab_size
    return text.replace(
        vision=vision,
        audio=audio,
        # The encoder-free class has no such field.
        vocab_size_per_layer_input=text.vocab_size if family == "12b" else text.vocab_size_per_layer_input,
        use_bidirectional_attention=None if family in ("e2b", "e4b") else "vision",
        boi_token_id=top - 7,
        boa_token_id=top - 6,
        image_token_id=top - 5,
        audio_token_id=top - 4,
        eoi_token_id=top - 3,
        eoa_token_id=top - 2,
        video_token_id=top - 1,
    )


def whole_reference(config: Gemma4Config, seed: int, *, perturbed: bool = True) -> Any:
    """A reference model; perturbed: with every weight and persistent buffer off its initial value."""
    torch.manual_seed(seed)
    raw = config.to_hf()
    unified = raw["model_type"] == "gemma4_unified"
    cls = Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration
    reference_config = (Gemma4UnifiedConfig if unified else ReferenceConfig).from_dict(raw)
    extra = {} if unified else {"experts_implementation": "eager"}
    model = cls._from_config(reference_config, attn_implementation="eager", dtype=torch.float32, **extra).eval()
    if not perturbed:
        return model
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    stored = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*parameters.items(), *model.named_buffers()]:
            last = name.rpartition(".")[2]
            if name not in stored:
                continue
            # Bounds that cut a few values in a hundred. At one deviation, where they cut a third, what is left of some
            # vectors before a norm is nearly nothing, and rounding is all that the norm finds.
            if last in ("input_min", "output_min"):
                tensor.fill_(-1.8 - torch.rand((), generator=generator))
            elif last in ("input_max", "output_max"):
                tensor.fill_(1.8 + torch.rand((), generator=generator))
            elif last == "bias" or last == "std_bias":
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif tensor.dim() <= 1:
                tensor.copy_(vector_scale(name, tensor) * (0.5 + torch.rand(tensor.shape, generator=generator)))
            elif "embed_tokens" in name or "pos" in last:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5)
    return model


def disk_names(reference: Any) -> dict[str, str]:
    """Our name of each of the reference's tensors; the 12B's are renamed as on disk."""
    renamed = {}
    for name in reference.state_dict():
        disk = name.replace("embed_vision.multimodal_embedder.", "embed_vision.")
        if any(part in name for part in ("patch_ln", "patch_dense", "pos_embedding", "pos_norm")):
            disk = name.replace("embed_vision.", "vision_embedder.")
        renamed[name] = our_name(disk, text_only=False)
    return renamed


def whole_ours(reference: Any, config: Gemma4Config) -> Gemma4:
    """Our model with the reference's weights, in memory."""
    model, names = Gemma4(config), disk_names(reference)
    state = {names[name]: t for name, t in reference.state_dict().items() if name != "lm_head.weight"}
    model.load_state_dict(state, strict=True)
    return model


def save_reference(model: Any, folder: Path, shards: int = 3) -> None:
    """Written by `transformers` itself, in several files."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=f"{max(size // shards // 1024, 1)}KB")


@dataclass
class Example:
    """A batch for both: ours, and the reference's keyword arguments."""

    tokens_BS: Tensor
    labels_BS: Tensor
    media: Media | None
    reference: dict[str, Tensor]
    images: list[tuple[Tensor, Tensor]]
    clips: list[Tensor]


def image_grid(config: Gemma4Config, pooled_width: int, pooled_height: int, generator: torch.Generator) -> Any:
    """Patches of a random image in reading order, and their (x, y)."""
    vision = config.vision
    assert vision is not None
    kernel = vision.pooling_kernel_size if vision.patches_per_token > 1 else 1
    width, height = pooled_width * kernel, pooled_height * kernel
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack((x.flatten(), y.flatten()), dim=-1)
    return torch.rand(width * height, vision.patch_width, generator=generator), positions


def make_example(config: Gemma4Config, rows: list[list[Any]], seed: int) -> Example:
    """Rows of pieces: a number of random text tokens, ("image", w, h), ("video", [(w, h), ..]) or ("audio", frames).

    Rows are padded at the end with unsupervised text.
    """
    generator = torch.Generator().manual_seed(seed)
    text_ids = config.vocab_size - 7
    images: list[tuple[Tensor, Tensor]] = []
    kinds: list[str] = []
    frames_per_video: list[int] = []
    clips: list[Tensor] = []
    token_rows: list[Tensor] = []
    for row in rows:
        ids: list[int] = []

        def grid(token: int, width: int, height: int, kind: str, ids: list[int] = ids) -> None:
            ids += [config.boi_token_id, *[token] * (width * height), config.eoi_token_id]
            images.append(image_grid(config, width, height, generator))
            kinds.append(kind)

        for piece in row:
            if isinstance(piece, int):
                ids += torch.randint(3, text_ids, (piece,), generator=generator).tolist()
            elif piece[0] == "image":
                grid(config.image_token_id, piece[1], piece[2], "image")
            elif piece[0] == "video":
                for width, height in piece[1]:
                    grid(config.video_token_id, width, height, "video")
                frames_per_video.append(len(piece[1]))
            else:
                assert config.audio is not None
                clips.append(torch.randn(piece[1], config.audio.frame_width, generator=generator))
                count = config.audio.num_tokens(piece[1])
                ids += [config.boa_token_id, *[config.audio_token_id] * count, config.eoa_token_id]
        token_rows.append(torch.tensor(ids))
    longest = max(map(len, token_rows))
    tokens = torch.stack(
        [torch.cat((r, torch.randint(3, text_ids, (longest - len(r),), generator=generator))) for r in token_rows]
    )
    labels = torch.randint(0, config.vocab_size, tokens.shape, generator=generator)
    for index, row_tokens in enumerate(token_rows):
        labels[index, len(row_tokens) :] = -100
    is_text = tokens < text_ids
    labels[~is_text] = -100
    types = torch.zeros_like(tokens)
    for number, token in ((1, config.image_token_id), (2, config.video_token_id), (3, config.audio_token_id)):
        types[tokens == token] = number
    reference: dict[str, Tensor] = {"mm_token_type_ids": types}
    for kind, values, positions in (
        ("image", "pixel_values", "image_position_ids"),
        ("video", "pixel_values_videos", "video_position_ids"),
    ):
        chosen = [image for image, its in zip(images, kinds, strict=True) if its == kind]
        if chosen:
            reference[values], reference[positions] = _pad_images(config, chosen)
    if frames_per_video:
        reference["num_frames_per_video"] = torch.tensor(frames_per_video)
    if clips:
        most = max(map(len, clips))
        reference["input_features"] = torch.stack([torch.nn.functional.pad(c, (0, 0, 0, most - len(c))) for c in clips])
        reference["input_features_mask"] = torch.stack([torch.arange(most) < len(c) for c in clips])
    media = Media.build(config, tokens, images, clips) if images or clips else None
    return Example(tokens, labels, media, reference, images, clips)


def _pad_images(config: Gemma4Config, images: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images padded as the released processors do: zeros, and position -1."""
    assert config.vision is not None
    length = SOFT_TOKENS * config.vision.patches_per_token
    values = torch.stack([torch.nn.functional.pad(v, (0, 0, 0, length - len(v))) for v, _ in images])
    positions = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, length - len(p)), value=-1) for _, p in images])
    return values, positions
