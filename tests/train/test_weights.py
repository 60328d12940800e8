"""Training runs that start from a released checkpoint, resume without it, and hand one back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4ForConditionalGeneration

from data.tokenizer import train_tokenizer
from model import ConfigError, Gemma4Config, UserError
from model.hf.hub import load_model
from tests.harness.compare import hold
from tests.harness.distributed import run_ranks
from tests.harness.exports import export_of
from tests.harness.multimodal import save_reference, whole_reference
from tests.harness.runs import losses, make_corpus, overrides, records, train_on, train_once
from train.export import MANIFEST
from train.load_config import load_config
from train.origin import Origin
from train.resolve import resolve

NAME = "gemma4_tiny_e4b"
VOCAB = 600


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint in bfloat16, written by transformers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    media = ("boi", "boa", "image", "audio", "eoi", "eoa", "video")
    ids = {f"{name}_token_id": VOCAB - 7 + i for i, name in enumerate(media)}
    config = Gemma4Config.from_name(NAME, vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=64, **ids)
    save_reference(whole_reference(config, 0).bfloat16(), folder)
    corpus = json.loads(make_corpus(folder).read_text().splitlines()[3])["text"]
    train_tokenizer([corpus], VOCAB).save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106, 50], "suppress_tokens": [9]}')
    return folder


def arguments(tmp_path: Path, released: Path, *more: str) -> list[str]:
    small = [a for a in overrides(tmp_path) if not a.startswith(("model.", "data.tokenizer_vocab_size"))]
    return [*small, f"model.weights={released}", *more]


def test_the_first_loss_is_that_of_the_weights_and_every_mesh_goes_on_alike(released: Path, tmp_path: Path) -> None:
    train_on(1, arguments(tmp_path, released, "run.dtype=float64", f"run.dir={tmp_path / 'one'}"))
    train_on(2, arguments(tmp_path, released, "run.dtype=float64", f"run.dir={tmp_path / 'two'}"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    difference = max(abs(a / b - 1) for a, b in zip(one, two, strict=True))
    hold("released weights on two ranks, float64: loss", difference, 1e-10)
    fresh = [a for a in arguments(tmp_path, released) if not a.startswith("model.weights")]
    sizes = [f"model.name={NAME}", f"model.vocab_size={VOCAB}", f"model.vocab_size_per_layer_input={VOCAB}"]
    train_on(1, [*fresh, *sizes, f"data.tokenizer={released}", f"run.dir={tmp_path / 'fresh'}", "model.hidden_size=64"])
    assert abs(losses(tmp_path / "fresh")[0] / one[0] - 1) > 0.1


def test_frozen_encoders_come_out_as_they_went_in_and_the_text_does_not(released: Path, tmp_path: Path) -> None:
    train_on(2, arguments(tmp_path, released, "export.at_end=true", "train.steps=3"))
    out = tmp_path / "run" / "export" / "step_00000003"
    opened: Any = Gemma4ForConditionalGeneration.from_pretrained(
        out, dtype="auto", output_loading_info=True, local_files_only=True
    )
    again, info = opened
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = load_model(released).state_dict(), load_model(out).state_dict()
    assert again.dtype == torch.bfloat16 and before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("language_model.") for name in moved)
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == [9]
    assert (out / "tokenizer.json").read_bytes() and (out / MANIFEST).is_file()


def test_a_run_goes_on_although_its_source_is_gone(released: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(released, tmp_path / "source"))
    train_on(2, arguments(tmp_path, released, f"run.dir={tmp_path / 'whole'}", "train.steps=4"))
    train_on(2, arguments(tmp_path, source, "train.steps=4", "checkpoint.every=2", "train.log_every=1"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    shutil.rmtree(source)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train_on(2, arguments(tmp_path, source, "train.steps=4", "checkpoint.every=2"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")[2:]


@pytest.mark.parametrize(
    ("more", "trained"),
    [
        ([], set()),
        (["model.vision=train"], {"vision_tower", "embed_vision"}),
        (["model.vision=projector", "model.audio=none"], {"embed_vision"}),
        (["model.audio=projector"], {"embed_audio"}),
    ],
    ids=["text", "vision", "vision projector", "audio projector"],
)
def test_what_is_trained_is_what_the_optimizer_holds(
    more: list[str], trained: set[str], released: Path, tmp_path: Path
) -> None:
    from parallel.world import World
    from train.trainer import Trainer

    def names(world: World) -> set[str]:
        run = resolve(load_config(arguments(tmp_path, released, *more)), world.size)
        trainer = Trainer(run, world, torch.device("cpu"))
        owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        found = {name.partition(".")[0] for name, p in trainer.model.named_parameters() if id(p) in owned}
        assert "audio_tower" not in dict(trainer.model.named_children()) or "model.audio=none" not in more
        return found

    assert run_ranks(1, names) == [{"language_model"} | trained]


def test_an_encoder_no_batch_touched_is_saved_and_found_again(released: Path, tmp_path: Path) -> None:
    """Its optimizer state exists from the start, so a checkpoint's keys do not depend on the data."""
    more = ("model.vision=train", "model.audio=train", "train.steps=4", "checkpoint.every=2")
    train_on(2, arguments(tmp_path, released, *more))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    whole = losses(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run_ranks(2, lambda world: train_once(arguments(tmp_path, released, *more), world)["step"])
    assert losses(tmp_path / "run") == whole[2:]


def test_a_frozen_encoder_may_be_trained_later(released: Path, tmp_path: Path) -> None:
    """The usual two stages: first with the towers frozen, then all; and back."""
    train_on(2, arguments(tmp_path, released, "train.steps=2"))
    branch = [f"run.resume={tmp_path / 'run' / 'checkpoints' / 'step_00000002'}", f"run.dir={tmp_path / 'second'}"]
    more = ("model.vision=train", "model.audio=projector", "train.steps=4", "export.at_end=true")
    train_on(2, arguments(tmp_path, released, *branch, *more))
    assert [r["step"] for r in records(tmp_path / "second")] == [3, 4]
    out = tmp_path / "second" / "export" / "step_00000004"
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == [
        9
    ]  # of the first run's source
    train_on(1, arguments(tmp_path, released, "train.steps=3", "model.vision=train", "model.audio=train"))
    train_on(1, arguments(tmp_path, released, "train.steps=5"))
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_frozen_table_stays_and_may_be_trained_later(released: Path, tmp_path: Path) -> None:
    more = ("optimizer.state_dtype=float8", "export.at_end=true")
    train_on(2, arguments(tmp_path, released, "train.steps=2", "model.per_layer_table=freeze", *more))
    train_on(1, arguments(tmp_path, released, "train.steps=4", "export.at_end=true", *more))
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4]
    table = "language_model.embed_tokens_per_layer.weight"
    exports = sorted((tmp_path / "run" / "export").glob("step_*"))
    states = [load_model(folder).state_dict() for folder in (released, *exports)]
    weights, first, second = (state[table] for state in states)
    assert torch.equal(weights, first) and not torch.equal(first, second)
    other = "language_model.embed_tokens.weight"
    assert not torch.equal(states[0][other], states[1][other])
    with pytest.raises(ConfigError, match=r"model.per_layer_table=freeze, but this model has no such table; legal: "):
        resolve(load_config(["+variant=tiny_31b", "model.per_layer_table=freeze"]), 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.weights=/nowhere"], "neither a folder nor a hub id"),
        (["model.vision=freez"], "model.vision=freez does not exist; nearest: freeze"),
        (["model.hidden_size=32"], "has shape .* where config.json makes it"),
        (["+variant=tiny_31b"], "has hidden_size=64, but model.name=gemma4_tiny_31b has 128; take"),
        (["export.dtype=float8"], "export.dtype=float8 does not exist; nearest: float32"),
    ],
)
def test_what_cannot_work_is_refused(more: list[str], message: str, released: Path, tmp_path: Path) -> None:
    with pytest.raises((UserError, AssertionError), match=message):
        train_on(1, arguments(tmp_path, released, *more))


def test_an_encoder_that_the_variant_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.audio=train, but this model has no audio encoder; legal: none\.$"):
        resolve(load_config(["+variant=tiny_31b", "model.audio=train"]), 1)


def test_weights_are_not_trained_at_the_rate_of_a_tiny_model_from_scratch(released: Path) -> None:
    with pytest.raises(ConfigError, match=r"at optimizer.lr=0.005, which suits a tiny model .* \+variant=e4b_it\.$"):
        load_config([f"model.weights={released}"])
    assert load_config([f"model.weights={released}", "optimizer.lr=1e-5"]).optimizer.lr == 1e-5


def test_a_frozen_encoder_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"would keep a tower of random weights; give model.weights, or set train\.$"):
        resolve(load_config(["+variant=tiny_31b", "model.vision=freeze"]), 1)


def test_an_export_without_what_the_run_kept_of_its_weights_is_refused_unless_asked_for(
    released: Path, tmp_path: Path
) -> None:
    train_on(1, arguments(tmp_path, released, "train.steps=1"))
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000001"
    assert json.loads((checkpoint / "state.json").read_text())["origin"] == Origin(run / "origin").digest != ""

    def export(**more: str) -> None:
        export_of(tmp_path, tmp_path / "out", **more)

    kept = (run / "origin" / "dtypes.json").read_text()
    for change in (kept.replace("bfloat16", "float32", 1), None):
        if change is None:
            shutil.rmtree(run / "origin")
        else:
            (run / "origin" / "dtypes.json").write_text(change)
        with pytest.raises(AssertionError, match=r"UserError: .*origin lacks what the run kept of"):
            export()
    export(dtype="float32")
    assert (tmp_path / "out" / "model.safetensors").is_file()

    archive = Path(shutil.copytree(checkpoint, tmp_path / "archive" / "checkpoints" / checkpoint.name))
    branch = [f"run.resume={archive}", "train.steps=2", f"run.dir={tmp_path / 'branch'}"]
    with pytest.raises(AssertionError, match=r"UserError: .*branch/origin lacks what the run kept"):
        train_on(1, arguments(tmp_path, released, *branch, "export.at_end=true"))
    train_on(1, arguments(tmp_path, released, *branch))
    assert len(losses(tmp_path / "branch")) == 1


def test_weights_that_learned_from_conversations_stop_at_a_turn_s_end(released: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(released, tmp_path / "base"))
    (base / "generation_config.json").write_text('{"eos_token_id": 1, "top_k": 9}')
    line = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(line) + "\n")
    chat = ["data.format=chat", f"data.source={tmp_path / 'chats.jsonl'}", "train.steps=1"]
    chat += ["model.vision=none", "model.audio=none"]
    train_on(1, arguments(tmp_path, base, *chat, "export.every=1", "export.at_end=true"))
    found = json.loads((tmp_path / "run" / "export" / "step_00000001" / "generation_config.json").read_text())
    assert found == {"eos_token_id": [1, 106, 50], "top_k": 9}
