"""What the reference makes of images, sounds and videos, its padding taken away.

Its video processors and the 12B's image processor do not import without torchvision. Of those modules the functions
that are plain torch are taken out of the source and run as they stand.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor
from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor

MODELS = Path(transformers.__file__).parent / "models"
TOKENS: Any = SimpleNamespace(
    boi_token="<|image>",
    image_token="<|image|>",
    eoi_token="<image|>",
    video_token="<|video|>",
    boa_token="<|audio>",
    audio_token="<|audio|>",
    eoa_token="<audio|>",
)
"""What the processors' text methods read of their processor."""


def reference_function(file: str, name: str) -> Callable[..., Any]:
    """Function `name` of a module that cannot be imported here."""
    tree = ast.parse((MODELS / file).read_text())
    found: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space: dict[str, Any] = {"torch": torch, "math": math}
    exec(compile(ast.Module(found, []), file, "exec"), space)
    return space[name]


def image_reference(image: Image.Image | np.ndarray, budget: int) -> tuple[Tensor, Tensor, str]:
    """Values [T, 768], positions [T, 2] and text of an image."""
    out: Any = Gemma4ImageProcessorPil(max_soft_tokens=budget)(image, return_tensors="pt")
    real = out["image_position_ids"][0, :, 0] >= 0
    text = Gemma4Processor.replace_image_token(TOKENS, out, 0)
    return out["pixel_values"][0][real], out["image_position_ids"][0][real], text


def merged_reference(values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The 12B's patches [T / 9, 6912] and positions from those of the other variants."""
    merge = reference_function("gemma4_unified/image_processing_gemma4_unified.py", "patches_merge")
    merged, places = merge(values[None], positions[None], len(values) // 9)
    return merged[0], places[0]


def frames_reference(frames: np.ndarray, columns: int, rows: int) -> Tensor:
    """Patches [N, T, 768] of uint8 frames [N, H, W, 3], resized as torchvision does: by torch's own bicubic kernel."""
    cut = reference_function("gemma4/video_processing_gemma4.py", "convert_video_to_patches")
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(video, (rows * 48, columns * 48), mode="bicubic", antialias=True)
    return cut(resized / 255, 16)


def mel_reference(waveform: np.ndarray) -> tuple[Tensor, str]:
    """Valid frames [T, 128] and text of a 16 kHz waveform."""
    out: Any = Gemma4AudioFeatureExtractor()([waveform])  # a bare array would be taken for its transpose
    mask = np.asarray(out["input_features_mask"][0])
    text = Gemma4Processor.replace_audio_token(TOKENS, out, 0)
    return torch.from_numpy(np.asarray(out["input_features"][0])[mask]), text


def waveform_reference(waveform: np.ndarray) -> tuple[Tensor, str]:
    """Frames [T, 640] and text of a 16 kHz waveform for the 12B, cut at 750 tokens."""
    out: Any = Gemma4UnifiedAudioFeatureExtractor()([waveform], max_length=750, return_tensors="pt")
    text = Gemma4UnifiedProcessor.replace_audio_token(TOKENS, out, 0)
    return out["input_features"][0][out["input_features_mask"][0]], text
