"""Every recipe runs: two steps of a tiny model on a few texts, conversations, pictures, sounds and videos."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import Tensor

from model import ConfigError
from model.hf.hub import load_model
from tests.harness.chat_files import E4B, TOKENIZER, chat, model, text, user, write, write_media
from tests.harness.multimodal import save_reference, whole_reference
from tests.harness.runs import make_corpus, overrides, records, train_on
from train.load_config import load_config
from train.resolve import resolve

PARTS = {
    "sft": None,
    "vision_sft": {"type": "image", "path": "cat.png"},
    "image_caption": {"type": "image", "path": "wide.png"},
    "audio_transcription": {"type": "audio", "path": "song.wav"},
    "video": {"type": "video", "path": "film.mp4"},
}
RATES = {  # of two steps: where the schedule of the recipe begins and ends
    "pretrain": (5e-3, 5e-4),
    "continue_pretrain": (7.5e-5 / 2, 0.0),
    "finetune": (5.5e-6, 1e-6),
    "sft": (5.5e-6, 1e-6),
    "vision_sft": (5.5e-6, 1e-6),
    "image_caption": (1.1e-5, 2e-6),
    "audio_transcription": (5.5e-6, 1e-6),
    "video": (5.5e-6, 1e-6),
}
MOVED = {"vision_sft": "embed_vision", "image_caption": "embed_vision", "video": "embed_vision"}
MOVED |= {"audio_transcription": "embed_audio"}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    config = E4B.replace(num_hidden_layers=4, sliding_window_pattern=2, num_kv_shared_layers=2)
    save_reference(whole_reference(config, 0), folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


def train(tmp_path: Path, recipe: str, *words: str) -> dict[str, Tensor]:
    """Parameters after two steps; the rates in the metrics are those of the recipe."""
    small = ["train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2", "data.workers=0"]
    where = [f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}", "run.device=cpu"]
    parameters = train_on(1, [f"+recipe={recipe}", *small, *where, *words])
    found = records(tmp_path / "run")
    assert [record["lr"] for record in found] == pytest.approx(RATES[recipe], rel=1e-6, abs=1e-12)
    assert all(math.isfinite(record["loss"]) for record in found)
    return parameters


def test_there_is_a_test_for_every_recipe() -> None:
    assert set(RATES) == set(PARTS) | {"pretrain", "continue_pretrain", "finetune"}


def test_pretraining_from_nothing(tmp_path: Path) -> None:
    sizes = [word for word in overrides(tmp_path) if word.startswith(("model.", "data.tokenizer", "data.source"))]
    train(tmp_path, "pretrain", "+variant=tiny_e4b", "data.sequence_length=48", *sizes)


@pytest.mark.parametrize("recipe", ["continue_pretrain", "finetune"])
def test_texts_go_on_from_released_weights(recipe: str, released: Path, tmp_path: Path) -> None:
    source = f"data.source={make_corpus(tmp_path)}"
    moved = train(tmp_path, recipe, f"model.weights={released}", source, "data.sequence_length=128")
    still = load_model(released).state_dict()
    towers = [name for name in moved if name.startswith(("vision_tower", "embed_vision", "audio_tower", "embed_audio"))]
    assert towers and all(still[name].equal(moved[name]) for name in towers)


@pytest.mark.parametrize("recipe", PARTS)
def test_conversations_train_the_decoder_and_the_projector_of_their_media(
    recipe: str, released: Path, media: Path, tmp_path: Path
) -> None:
    part = PARTS[recipe]
    files = {name: str(media / name) for name in ("cat.png", "wide.png", "song.wav", "film.mp4")}
    parts = [part | {"path": files[part["path"]]}] if part else []
    write(tmp_path, [chat(user(*parts, text("What is it?")), model("A cat. " * n)) for n in range(1, 9)])
    words = [f"model.weights={released}", f"data.source={tmp_path / 'chats.jsonl'}", "data.sequence_length=512"]
    parameters = train(tmp_path, recipe, *words)
    before = load_model(released).state_dict()
    changed = {name.partition(".")[0] for name, p in parameters.items() if not before[name].equal(p)}
    assert changed == {"language_model", MOVED[recipe]} if recipe in MOVED else changed == {"language_model"}


@pytest.mark.parametrize("variant", ["tiny_12b", "tiny_31b"])
def test_recipes_fit_the_other_kinds_of_model(variant: str) -> None:
    for recipe in RATES:
        hears = variant == "tiny_12b"
        towers = ["model.vision=train"] if recipe not in ("pretrain", "finetune", "sft", "audio_transcription") else []
        if recipe == "audio_transcription":
            towers = ["model.audio=train"]
        run = [f"+variant={variant}", f"+recipe={recipe}", *towers]
        if recipe == "audio_transcription" and not hears:
            with pytest.raises(
                ConfigError, match=r"model\.audio=train, but this model has no audio encoder; legal: none"
            ):
                resolve(load_config(run), 1)
            continue
        found = resolve(load_config(run), 1)
        assert (found.micro_batch_size, found.config.train.global_batch_size) == (8, 16)
        assert found.config.data.sequence_length in (256, 512, 1024)
