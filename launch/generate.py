"""Write text with a checkpoint folder, from a prompt and pictures, sound or video; it appears as it is made.

    python -m launch.generate weights=my-gemma prompt="What is in this picture?" image=cat.png
    python -m launch.generate weights=gemma4_e4b_it prompt="What does she say?" audio=call.wav thinking=true
    python -m launch.generate weights=my-base chat=false prompt="The river" temperature=0

image=, audio= and video= may be given several times; they come before the prompt, in this order.
chat: whether the prompt is a user's turn (the default where the folder has a chat template) or
plain text to go on with. Others: system=TEXT, max_new_tokens=256, top_k=64, top_p=0.95, seed=0,
device=auto|cpu|cuda, dtype=auto|float32|bfloat16|float64, special=true to see control tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream

from data.chat.encode import encode
from data.chat.render import render
from data.chat.template import template_size
from data.media.files import check_media_tokens, media_processor
from data.media.process import MediaItem
from data.tokenizer import BOS, STOPS
from launch.arguments import run
from model import Gemma4, UserError
from model.generate import Sampling, generate_tokens
from model.hf.config import read_json
from model.hf.hub import load_model, load_tokenizer, resolve
from parallel.world import DEVICES, DTYPES, World, compute_dtype, select_device


@dataclass
class Options:
    """Arguments of `gemwright generate`."""

    weights: str
    prompt: str
    image: list[str] = field(default_factory=list)
    audio: list[str] = field(default_factory=list)
    video: list[str] = field(default_factory=list)
    system: str | None = None
    chat: bool | None = None
    thinking: bool = False
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    seed: int = 0
    device: str = field(default="auto", metadata={"choices": DEVICES})
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    special: bool = False


def generate(options: Options) -> Iterator[str]:
    """Pieces of text as they become whole characters. Raises `UserError`."""
    device = select_device(options.device, World.from_environment())
    folder = resolve(options.weights)
    model = load_model(folder, dtype=compute_dtype(options.dtype, device), device=device)
    tokenizer = load_tokenizer(folder)
    chat = options.chat if options.chat is not None else _has_template(folder)
    media = _read_media(options, model)
    if media:
        check_media_tokens(tokenizer, model.config)
    if chat:
        rendered = render(
            _messages(options),
            size=template_size(model.config),
            enable_thinking=options.thinking,
            add_generation_prompt=True,
        )
        ids = encode(rendered, tokenizer, media).ids
    elif media or options.system or options.thinking:
        raise UserError("media, system and thinking belong to a chat; set chat=true, or leave them out.")
    else:
        tokenizer.encode_special_tokens = True
        ids = [BOS, *tokenizer.encode(options.prompt, add_special_tokens=False).ids]
    if len(ids) + options.max_new_tokens > model.config.max_position_embeddings:
        raise UserError(
            f"the prompt's {len(ids)} tokens and max_new_tokens={options.max_new_tokens} exceed the model's "
            f"{model.config.max_position_embeddings} positions; lower max_new_tokens or shorten the prompt."
        )
    stops = _stops(folder)
    generator = torch.Generator().manual_seed(options.seed)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, generator)
    text = DecodeStream(skip_special_tokens=not options.special)
    for (token,) in generate_tokens(
        model,
        [ids],
        options.max_new_tokens,
        images=[image for item in media for image in item.images],
        clips=[clip for item in media for clip in item.clips],
        sampling=sampling,
        stop=stops,
        device=device,
    ):
        if token in stops and not options.special:
            return
        piece = text.step(tokenizer, token)
        if piece is not None:
            yield piece


def _messages(options: Options) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": kind, "path": path} for kind in ("image", "audio", "video") for path in getattr(options, kind)
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": options.prompt}]}]
    return [{"role": "system", "content": options.system}, *messages] if options.system else messages


def _read_media(options: Options, model: Gemma4) -> list[MediaItem]:
    config = model.config
    for kind, encoder in (("image", config.vision), ("video", config.vision), ("audio", config.audio)):
        if getattr(options, kind) and encoder is None:
            raise UserError(f"{options.weights} has no encoder for {kind}; choose another checkpoint or leave it out.")
    processor = media_processor(config)
    return [
        *(processor.image(Path(path)) for path in options.image),
        *(processor.audio(Path(path)) for path in options.audio),
        *(processor.video(Path(path)) for path in options.video),
    ]


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    tokenizer = folder / "tokenizer_config.json"
    return tokenizer.is_file() and "chat_template" in read_json(tokenizer)


def _stops(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    return list(STOPS) if found is None else [found] if isinstance(found, int) else list(found)


def print_generated(options: Options) -> None:
    """Print a continuation while it is made."""
    for piece in generate(options):
        print(piece, end="", flush=True)
    print()


def main() -> None:
    """Generate from the command line's prompt."""
    run(Options, print_generated, __doc__)


if __name__ == "__main__":
    main()
