"""Small training runs for tests: a corpus made on the spot, tiny sizes, float32."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.utils import canonical_fqn

from parallel.world import World
from tests.harness.distributed import run_ranks
from train.load_config import load_config
from train.resolve import resolve
from train.trainer import Trainer

SMALL = [
    "model.vocab_size=512",
    "model.vocab_size_per_layer_input=512",
    "model.hidden_size=64",
    "model.intermediate_size=64",
    "model.num_hidden_layers=4",
    "model.sliding_window_pattern=2",
    "model.num_kv_shared_layers=2",
    "model.vision=none",
    "model.audio=none",
    "model.sliding_window=16",
    "data.tokenizer_vocab_size=400",
    "data.sequence_length=48",
    "train.steps=5",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.sample_every=0",
    "checkpoint.every=0",
    "run.device=cpu",
    "run.dtype=float32",
    # AdamW turns the rounding of a near-zero gradient into a step of this size: as large as real runs take.
    "optimizer.lr=5e-4",
]


def make_corpus(folder: Path) -> Path:
    """Documents of very different lengths, some shorter than a sequence."""
    draw = random.Random(0)
    words = [draw.choice("aeiou") + draw.choice("bcdfgklmnprst") + draw.choice("aeiou") for _ in range(60)]
    documents = [" ".join(draw.choices(words, k=draw.choice((3, 10, 40, 200)))) for _ in range(120)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def overrides(tmp_path: Path, *more: str, run: str = "run") -> list[str]:
    corpus = tmp_path / "corpus.jsonl"
    if not corpus.exists():
        make_corpus(tmp_path)
    where = [f"data.source={corpus}", f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / run}"]
    return [*SMALL, *where, *more]


def train_once(arguments: list[str], world: World) -> dict[str, Any]:
    """Train on this rank; whole parameters and the position reached."""
    trainer = Trainer(resolve(load_config(arguments), world.size), world, torch.device("cpu"))
    trainer.train()
    return {"step": trainer.progress.step, "parameters": whole_parameters(trainer.model)}


def whole_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        canonical_fqn(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train_on(world_size: int, arguments: list[str]) -> dict[str, Tensor]:
    """Train on this many real ranks; the parameters reached."""
    return run_ranks(world_size, lambda world: train_once(arguments, world))[0]["parameters"]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]
