"""Conversation files with media, and tiny models that read them."""

from __future__ import annotations

import json
import wave
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data.chat.documents import ChatFormat
from data.corpus.prepare import Corpus, prepare
from data.tokenizer import train_tokenizer
from model import Gemma4Config

TOKENIZER = train_tokenizer(["What is it? A cat, a bird, a song and a film. " * 20], 400)
LENGTH = 512


def model_config(name: str, soft_tokens: int = 70) -> Gemma4Config:
    """A tiny variant that reads `TOKENIZER`, its images of at most `soft_tokens` tokens."""
    names = {"boi": "<|image>", "boa": "<|audio>", "image": "<|image|>", "audio": "<|audio|>", "eoi": "<image|>"}
    names |= {"eoa": "<audio|>", "video": "<|video|>"}
    ids = {f"{key}_token_id": TOKENIZER.token_to_id(token) for key, token in names.items()}
    vocab_size = TOKENIZER.get_vocab_size()
    config = Gemma4Config.from_name(name).replace(vocab_size=vocab_size, vocab_size_per_layer_input=vocab_size, **ids)
    assert config.vision is not None
    return config.replace(vision=replace(config.vision, soft_tokens=soft_tokens))


CONFIGS = {name: model_config(name) for name in ("gemma4_tiny_e4b", "gemma4_tiny_12b")}
E4B = CONFIGS["gemma4_tiny_e4b"]
TEXT_ONLY = E4B.replace(vision=None, audio=None)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts) if parts else "What is it?"}


def model(content: Any = "A cat.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": messages, **more}


def from_value(*turns: str) -> list[dict[str, str]]:
    """Messages as ShareGPT writes them, each given as its role and its text."""
    return [{"from": turn.partition(" ")[0], "value": turn.partition(" ")[2]} for turn in turns]


def write(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def prepared(folder: Path, config: Gemma4Config, source: Path | None = None, **more: Any) -> Corpus:
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        TOKENIZER.save(str(tokenizer))
    fields: dict[str, Any] = {"tokenizer": tokenizer, "config": config, "sequence_length": LENGTH} | more
    return prepare(str(source or folder / "chats.jsonl"), ChatFormat(**fields), folder / "cache")


def make(folder: Path, lines: Iterable[dict[str, Any]], config: Gemma4Config = TEXT_ONLY, **more: Any) -> Corpus:
    write(folder, lines)
    return prepared(folder, config, **more)


def write_media(folder: Path) -> Path:
    """cat.png, wide.png, song.wav, film.mp4 of three frames."""
    draw = np.random.default_rng(0)
    for name, shape in (("cat.png", (120, 90, 3)), ("wide.png", (40, 200, 3))):
        Image.fromarray(draw.integers(256, size=shape, dtype=np.uint8)).save(folder / name)
    with wave.open(str(folder / "song.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(draw.integers(-9000, 9000, 5000).astype(np.int16).tobytes())
    with av.open(str(folder / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(draw.integers(256, size=(64, 96, 3), dtype=np.uint8))))
        film.mux(stream.encode(None))
    return folder
