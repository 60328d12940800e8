"""Batches of which some hold images, sound or videos and others only text."""

from __future__ import annotations

from typing import Any

import torch

from data.batch import Batch
from model import Gemma4Config
from tests.harness.multimodal import make_example

ROWS: list[list[Any]] = [[6, ("image", 2, 2), 9], [30], [5, ("audio", 30), 4], [28], [3, ("video", [(2, 1)] * 2)], [25]]


def config_of(name: str) -> Gemma4Config:
    return Gemma4Config.from_name(name)


def batches(config: Gemma4Config, rows: list[list[Any]]) -> list[Batch]:
    """One batch for each row, all of one length; a variant without audio gets text for it."""
    found = []
    for index, row in enumerate(rows):
        pieces = [p if isinstance(p, int) or config.audio or p[0] != "audio" else 8 for p in row]
        example = make_example(config, [pieces], seed=index)
        tokens, labels = example.tokens_BS[:, :48], example.labels_BS[:, :48]
        pad = 48 - tokens.shape[1]
        tokens = torch.nn.functional.pad(tokens, (0, pad), value=5)
        labels = torch.nn.functional.pad(labels, (0, pad), value=-100)
        found.append(
            Batch.make(config, tokens, labels, torch.arange(48)[None], torch.zeros_like(tokens), example.media)
        )
    return found
