"""The launch commands as a user runs them: variants, generate, export, and their mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from data.chat.encode import encode
from data.chat.render import render
from data.chat.template import chat_template
from data.clean.settings import Cleaning
from data.tokenizer import train_tokenizer
from launch.arguments import parse
from launch.benchmarks.compare import Options as BenchmarkOptions
from launch.generate import Options, generate
from launch.variants import parameters
from model import Gemma4Config, UserError
from model.hf.hub import load_model, load_tokenizer
from tests.harness.multimodal import save_reference, whole_reference
from tests.harness.runs import overrides, train_on

ROOT = Path(__file__).parents[2]
VOCAB = 600


def command(module: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of every tiny kind, with tokenizer and chat template, and a picture and a sound."""
    root = tmp_path_factory.mktemp("folders")
    media = ("boi", "boa", "image", "audio", "eoi", "eoa", "video")
    ids = {f"{name}_token_id": VOCAB - 7 + i for i, name in enumerate(media)}
    tokenizer = train_tokenizer([" ".join(f"word{i}" for i in range(400))], VOCAB)
    assert tokenizer.get_vocab_size() == VOCAB
    found = {}
    for name in ("tiny_e4b", "tiny_12b", "tiny_31b"):
        config = Gemma4Config.from_name(name, vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, **ids)
        reference = whole_reference(config, 0)
        with torch.no_grad():  # tied to the head, a table of usual size would repeat the last token for ever
            reference.get_input_embeddings().weight.mul_(0.05)
        save_reference(reference, root / name, shards=1)
        tokenizer.save(str(root / name / "tokenizer.json"))
        (root / name / "chat_template.jinja").write_text(chat_template("small" if "e4b" in name else "large"))
        found[name] = root / name
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(root / "a.png")
    with wave.open(str(root / "a.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes((np.sin(np.arange(16_000) / 9) * 9000).astype(np.int16).tobytes())
    return found | {"image": root / "a.png", "audio": root / "a.wav"}


def written(folders: dict[str, Path], name: str, **options: Any) -> str:
    defaults: dict[str, Any] = {"prompt": "word1 word2", "max_new_tokens": 20, "special": True}
    return "".join(generate(Options(weights=str(folders[name]), **(defaults | options))))


@pytest.mark.parametrize("name", ["tiny_e4b", "tiny_12b", "tiny_31b"])
def test_what_is_seen_and_heard_changes_what_is_written(folders: dict[str, Path], name: str) -> None:
    plain = written(folders, name)
    assert plain == written(folders, name) and len(plain) > 5
    texts = {plain, written(folders, name, chat=False)}
    texts |= {written(folders, name, system="word9"), written(folders, name, thinking=True)}
    texts.add(written(folders, name, image=[str(folders["image"])]))
    if name != "tiny_31b":
        texts.add(written(folders, name, audio=[str(folders["audio"])]))
        texts.add(written(folders, name, image=[str(folders["image"])] * 2, audio=[str(folders["audio"])]))
    assert len(texts) == (5 if name == "tiny_31b" else 7)
    assert len({written(folders, name, seed=seed) for seed in range(3)}) == 3


def test_generate_streams_on_the_console(folders: dict[str, Path]) -> None:
    status, out, _ = command(
        "generate",
        f"weights={folders['tiny_e4b']}",
        "prompt=word1: a=b, {c}",
        f"image={folders['image']}",
        "max_new_tokens=8",
        "special=true",
    )
    assert status == 0 and out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights=/nowhere", "prompt=a"], "neither a folder nor a hub id"),
        (["weights=x/y"], "prompt=... is missing; --help shows an example."),
        (["weight=x"], "weight is no argument; nearest: weights"),
        (["prompt"], "'prompt' is not KEY=VALUE; write prompt=...."),
        (["weights={tiny_31b}", "prompt=a", "audio={audio}"], "has no encoder for audio; choose another checkpoint"),
        (["weights={tiny_e4b}", "prompt=a", "image=/nowhere.png"], "/nowhere.png"),
        (["weights={tiny_e4b}", "prompt=a", "top_k=many"], "top_k=many has the wrong type; top_k is a whole number."),
        (["weights={tiny_e4b}", "prompt=a", "max_new_tokens=9000"], "exceed the model's 8192 positions"),
        (["weights={tiny_e4b}", "prompt=see <|image|>"], "<|image|>"),
        (["weights={tiny_e4b}", "prompt=a", "chat=false", "thinking=true"], "belong to a chat; set chat=true"),
        (["weights={tiny_e4b}", "prompt=a", "device=tpu"], "device=tpu does not exist"),
    ],
)
def test_mistakes_are_one_sentence(folders: dict[str, Path], arguments: list[str], message: str) -> None:
    filled = [a.format(**folders) if "{tiny" in a or "{audio" in a else a for a in arguments]
    with pytest.raises(UserError) as caught:
        for _ in generate(parse(Options, filled)):
            pass
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_variants_prints_all_of_them() -> None:
    status, out, _ = command("variants")
    assert status == 0
    for text in ("gemma4_26b_a4b_it", "31,273,086,512", "3,822,530,560", "google/gemma-4-12B-it", "128 experts, top 8"):
        assert text in out
    assert parameters(Gemma4Config.from_name("gemma4_e2b"))["total"] == 5_104_297_504
    assert "gemma4_31b_it" not in command("variants", "e4b", "gemma4_31b")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["variants", "32b"], "nearest: gemma4_"),
        (["variants", "nams=e4b"], "nams is no argument; nearest: names (all: names)."),
        (["benchmarks.compare", "attentoin"], "what=attentoin does not exist; nearest: attention (all: "),
        (["benchmarks.compare", "attention", "rouns=3"], "rouns is no argument; nearest: rounds (all: what, rounds)."),
        (["benchmarks.compare", "rounds=3"], "what=... is missing; --help shows an example."),
        (["benchmarks.compare", "loss", "rounds=few"], "rounds=few has the wrong type; rounds is a whole number."),
    ],
    ids=" ".join,
)
def test_a_mistyped_word_or_key_names_the_nearest(arguments: list[str], message: str) -> None:
    status, out, error = command(*arguments)
    assert (status, out) == (1, "") and message in error and len(error.splitlines()) == 1


def test_words_and_keys_may_be_mixed() -> None:
    assert parse(BenchmarkOptions, ["loss", "rounds=3", "load"], "what") == BenchmarkOptions(["loss", "load"], 3)
    assert parse(BenchmarkOptions, ["what=loss"]) == BenchmarkOptions(["loss"])
    given = ["source=a", "out=b", "filters=[c4, fineweb]", "filters=gopher_quality"]
    assert parse(Cleaning, given).filters == ["c4", "fineweb", "gopher_quality"]
    assert parse(Cleaning, [*given[:2], "filters=[]"]).filters == []


def test_export_of_a_run_by_command(tmp_path: Path) -> None:
    train_on(2, overrides(tmp_path, "+variant=tiny_26b_a4b", "train.steps=2"))
    out = tmp_path / "out"
    status, text, error = command("export", f"run={tmp_path / 'run'}", f"out={out}")
    assert status == 0, error
    assert text.startswith("step_00000002 of ") and "768 tokens seen" in text
    assert json.loads((out / "config.json").read_text())["model_type"] == "gemma4_text"
    model = load_model(out)
    assert model.config.num_experts == 16 and model.config.vision is None
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    encoded: Any = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert encoded["input_ids"] == encode(render(messages, size="large"), ours).ids
    assert theirs.eos_token_id == 1 and theirs.pad_token_id == 0 and theirs.bos_token_id == 2
    written = (out / "model.safetensors").stat().st_mtime_ns
    status, _, _ = command("export", f"run={tmp_path / 'run'}", f"out={out}")
    assert status == 0 and (out / "model.safetensors").stat().st_mtime_ns == written  # it is there: nothing to do
    status, _, error = command("export", f"run={tmp_path / 'run'}", f"out={tmp_path}")
    assert status == 1 and error.startswith("error: ") and "is there already" in error
    status, _, error = command("export", f"run={tmp_path}", f"out={out}")
    assert status == 1 and error.endswith("holds no checkpoints; give the run.dir of a training run.\n")
    status, _, error = command("export", f"run={tmp_path / 'run'}", "out=x", "checkpoint=step_9")
    assert status == 1 and "step_9" in error and len(error.splitlines()) == 1
