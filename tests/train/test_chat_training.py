"""Fine-tuning on conversations with pictures, sound and video: meshes agree, runs resume, mistakes are one sentence."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.hf.hub import load_model
from tests.harness.chat_files import CONFIGS, TOKENIZER, chat, model, text, user, write, write_media
from tests.harness.compare import hold
from tests.harness.multimodal import save_reference, whole_reference
from tests.harness.report import report
from tests.harness.runs import losses, train_on

STEPS = 4


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param]
    shared = 2 if config.num_kv_shared_layers else 0
    config = config.replace(num_hidden_layers=4, sliding_window_pattern=2, num_kv_shared_layers=shared)
    save_reference(whole_reference(config, 0), folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of very different lengths; media in about half of them."""
    folder, draw = write_media(tmp_path_factory.mktemp("chats")), random.Random(1)
    lines = []
    for number in range(40):
        parts: list[Any] = [text("What is it? " * draw.randint(1, 8))]
        if number % 4 == 0:
            parts.insert(0, {"type": "image", "path": draw.choice(("cat.png", "wide.png"))})
        if number % 6 == 1:
            parts.append({"type": "audio", "path": "song.wav"})
        if number % 20 == 2:
            parts.append({"type": "video", "path": "film.mp4"})
        lines.append(chat(user(*parts), model("A cat. " * draw.randint(1, 9)), user(), model("A bird.")))
    write(folder, lines)
    return folder


def arguments(released: Path, conversations: Path, tmp_path: Path, *more: str, run: str = "run") -> list[str]:
    return [
        f"model.weights={released}",
        "model.vision=train",
        "model.audio=train",
        "data.format=chat",
        f"data.source={conversations / 'chats.jsonl'}",
        f"data.cache={tmp_path / 'cache'}",
        "data.sequence_length=512",
        f"run.dir={tmp_path / run}",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.sample_every=0",
        "checkpoint.every=2",
        "run.device=cpu",
        "optimizer.lr=2e-4",
        *more,
    ]


def test_every_mesh_and_worker_count_gives_the_same_losses(released: Path, conversations: Path, tmp_path: Path) -> None:
    double = "run.dtype=float64"
    alone = train_on(1, arguments(released, conversations, tmp_path, double, run="1"))
    expected = losses(tmp_path / "1")
    assert expected[-1] < expected[0]
    for ranks, more in (
        (2, ["train.micro_batch_size=1", "data.workers=1"]),
        (4, ["activation_checkpoint.mode=full", "parallel.dp_replicate=2"]),
    ):
        parameters = train_on(ranks, arguments(released, conversations, tmp_path, double, *more, run=f"{ranks}"))
        found = losses(tmp_path / f"{ranks}")
        difference = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        moved = max((parameters[name] - alone[name]).abs().max().item() for name in alone)
        report(
            "Conversations with media against one process, float64",
            {
                "model": released.name,
                "ranks": ranks,
                "options": " ".join(more),
                "first loss": f"{expected[0]:.4f}",
                "last loss": f"{expected[-1]:.4f}",
                "rel. dloss": f"{difference:.1e}",
                "max |dparam|": f"{moved:.1e}",
            },
        )
        hold("conversations with media on meshes, float64: loss", difference, 1e-10, ranks)
        hold("conversations with media on meshes, float64: parameters", moved, 1e-9, ranks)


def test_a_killed_run_goes_on_and_its_export_opens(released: Path, conversations: Path, tmp_path: Path) -> None:
    train_on(2, arguments(released, conversations, tmp_path, "export.at_end=true", run="whole"))
    train_on(2, arguments(released, conversations, tmp_path, "export.at_end=true"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    shutil.rmtree(tmp_path / "run" / "export")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    sampled = [f"train.sample_every={STEPS}", "train.sample_tokens=3"]
    train_on(2, arguments(released, conversations, tmp_path, "export.at_end=true", *sampled))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and all(sample["prompt"].endswith("<|turn>model\n") for sample in samples)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")[2:]
    ours, theirs = (load_model(tmp_path / run / "export" / f"step_{STEPS:08d}") for run in ("run", "whole"))
    before = load_model(released).state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    moved = {name.partition(".")[0] for name, t in ours.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name.partition(".")[0] for name, _ in ours.named_parameters()}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_gone_is_one_sentence(
    released: Path, conversations: Path, tmp_path: Path, workers: int
) -> None:
    copy = Path(shutil.copytree(conversations, tmp_path / "copy"))
    train_on(1, arguments(released, copy, tmp_path, "train.steps=1"))
    for picture in copy.glob("*.png"):
        picture.unlink()
    with pytest.raises(AssertionError, match=r"UserError: .*\.png") as caught:
        train_on(1, arguments(released, copy, tmp_path, "train.steps=40", f"data.workers={workers}"))
    assert "Original Traceback" not in str(caught.value)


def test_a_conversation_the_model_cannot_see_is_refused(released: Path, conversations: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"chats.jsonl:\d+: .*model\.vision"):
        train_on(1, arguments(released, conversations, tmp_path, "model.vision=none", "model.audio=none"))
    assert json.loads((released / "config.json").read_text())["vision_config"]
