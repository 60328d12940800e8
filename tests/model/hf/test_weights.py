"""Released folders: config in both spellings, tensors that may be there or not, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import ConfigError, Gemma4Config, UserError
from model.hf.config import config_to_hf
from model.hf.hub import load_model, load_tokenizer, resolve
from model.hf.weights import INDEX, disk_key, our_name
from model.variants import VARIANT_NAMES
from tests.harness.multimodal import random_whole_config, save_reference, whole_reference
from tests.harness.reference import (
    perturbed_reference,
    random_config,
)
from tests.harness.report import report


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_every_variant_survives_its_own_config_json_in_each_spelling(name: str) -> None:
    config = Gemma4Config.from_name(name)
    both = json.loads(json.dumps(config.to_hf()))
    assert Gemma4Config.from_hf(both) == config
    released, newer = json.loads(json.dumps(both)), json.loads(json.dumps(both))
    del released["text_config"]["per_layer_config"]
    for flat in ("global_head_dim", "num_global_key_value_heads"):
        del newer["text_config"][flat]
    assert Gemma4Config.from_hf(released) == config == Gemma4Config.from_hf(newer)
    text = config.replace(vision=None, audio=None)
    media = {f: getattr(text, f) for f in vars(text) if f.endswith("_token_id") and f[:3] not in ("pad", "eos", "bos")}
    assert Gemma4Config.from_hf(json.loads(json.dumps(text.to_hf())) | media) == text


def test_a_config_of_another_model_is_refused() -> None:
    raw = Gemma4Config.from_name("gemma4_e4b").to_hf()
    for change, message in (
        ({"model_type": "gemma3"}, "model_type gemma3; this reads .* nearest: gemma4"),
        ({"text_config": raw["text_config"] | {"hidden_activation": "silu"}}, "hidden_activation=silu"),
        (
            {"text_config": {**raw["text_config"], "layer_types": ["full_attention", "sliding_attention"] * 21}},
            "layer_types",
        ),
        ({"text_config": {"hidden_size": 8}}, "lacks intermediate_size"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ({"text_config": raw["text_config"] | {"final_logit_softcapping": None}}, "no final_logit_softcapping"),
        ({"text_config": raw["text_config"] | {"rope_parameters": {"rope_theta": 1.0}}}, "rope_parameters without"),
        ({"text_config": raw["text_config"] | {"hidden_size": "wide"}}, "wrong kind .*; fetch it again"),
        ({"text_config": raw["text_config"] | {"per_layer_config": {"x": {}}}}, "wrong kind .*; fetch it again"),
        (
            {"vision_config": raw["vision_config"] | {"hidden_activation": "silu"}},
            "vision_config.hidden_activation=silu",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Gemma4Config.from_hf(raw | change)


def test_what_a_source_says_beyond_our_fields_survives_and_what_is_no_longer_true_does_not() -> None:
    config = Gemma4Config.from_name("gemma4_e4b")
    base = config.to_hf() | {"eos_token_id": [1, 106], "torch_dtype": "float32", "quantization_config": {}, "own": 1}
    base["text_config"] |= {"eos_token_id": [1, 106, 50], "dtype": "float32", "own": 2}
    base["vision_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    assert Gemma4Config.from_hf(base) == config
    out = config_to_hf(config, base, dtype="bfloat16")
    assert out["eos_token_id"] == [1, 106] and out["own"] == 1 and out["dtype"] == "bfloat16"
    assert out["text_config"]["eos_token_id"] == [1, 106, 50] and out["text_config"]["own"] == 2
    assert out["text_config"]["dtype"] == "bfloat16" and not {"torch_dtype", "quantization_config"} & out.keys()
    assert out["vision_config"]["rope_parameters"]["rope_type"] == "default"
    unified = Gemma4Config.from_name("gemma4_12b")
    bare = unified.to_hf()
    for name in ("use_bidirectional_attention", "max_position_embeddings"):
        del bare["text_config"][name]
    assert Gemma4Config.from_hf(bare) == unified


def test_keys_on_disk_invert() -> None:
    for name in ("language_model.layers.0.self_attn.q_proj.weight", "language_model.embed_tokens.weight"):
        for text_only in (False, True):
            assert our_name(disk_key(name, text_only=text_only), text_only=text_only) == name
    assert disk_key("language_model.norm.weight", text_only=True) == "model.norm.weight"
    assert disk_key("vision_tower.std_bias", text_only=False) == "model.vision_tower.std_bias"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    save_reference(whole_reference(random_whole_config("e4b", 1), 1), folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Rewrite the folder's weights as one file."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_dead_tensors_may_be_there(source: Path, tmp_path: Path) -> None:
    """The first releases kept keys and values of consumer layers; some tools write the tied head and rotary tables."""
    folder = Path(shutil.copytree(source, tmp_path / "old"))
    config = Gemma4Config.from_hf(folder)
    layer = f"model.language_model.layers.{config.first_kv_shared_layer}.self_attn."
    dead = {f"{layer}{part}.weight": torch.randn(4, 4) for part in ("k_proj", "v_proj", "k_norm")}
    dead["model.language_model.rotary_emb.inv_freq"] = torch.ones(4)
    table = "model.language_model.embed_tokens.weight"
    edit(folder, lambda tensors: tensors | dead | {"lm_head.weight": tensors[table].clone()})
    clean, old = load_model(source).state_dict(), load_model(folder).state_dict()
    assert clean.keys() == old.keys() and all(torch.equal(clean[key], old[key]) for key in clean)


def test_bfloat16_on_disk_becomes_what_is_asked_for(tmp_path: Path) -> None:
    reference = perturbed_reference(random_config("31b", 2), 2).bfloat16()
    save_reference(reference, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(tmp_path, dtype=dtype)
        for name, parameter in model.named_parameters():
            theirs = reference.state_dict()[disk_key(name, text_only=True)]
            assert parameter.dtype == dtype and torch.equal(parameter.to(theirs.dtype), theirs)
        assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


def largest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)


def cut_short(folder: Path) -> None:
    file = largest(folder)
    os.truncate(file, file.stat().st_size - 100)


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def no_shard(folder: Path) -> None:
    largest(folder).unlink()


def broken_header(folder: Path) -> None:
    with largest(folder).open("r+b") as file:
        file.seek(10)
        file.write(b"\xff\xff\xff")


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def promised(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.language_model.nowhere.weight"] = largest(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def whole_numbers(folder: Path) -> None:
    edit(folder, lambda t: t | {"model.language_model.norm.weight": torch.ones(64, dtype=torch.int64)})


def lacking(folder: Path) -> None:
    edit(folder, lambda t: {key: v for key, v in t.items() if key != "model.audio_tower.output_proj.bias"})


def left_over(folder: Path) -> None:
    edit(folder, lambda t: t | {"model.language_model.layers.0.self_attn.gate.weight": torch.ones(3)})


def other_shape(folder: Path) -> None:
    edit(folder, lambda t: t | {"model.language_model.norm.weight": torch.ones(63)})


def rewrite_config(**change: Any) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return rewrite


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"model-0000\d-of-0000\d.safetensors is damaged or cut short .*; fetch it again\.$"),
        (broken_header, r"is damaged or cut short .*; fetch it again\.$"),
        (no_index, r"holds \d weight shards but no model.safetensors.index.json; fetch that file too\.$"),
        (no_shard, r"safetensors is missing, though model.safetensors.index.json names it; fetch it\.$"),
        (broken_index, r"is no index of weights .*; fetch it again\.$"),
        (promised, r"has no tensor model.language_model.nowhere.weight, though .* promises it; fetch both again\.$"),
        (whole_numbers, r"model.language_model.norm.weight in .* is of dtype I64; weights must be F32, BF16, F16: "),
        (lacking, r"has no tensor model.audio_tower.output_proj.bias; fetch the checkpoint again\.$"),
        (left_over, r"self_attn.gate.weight in .* has no place in this model; config and weights are of different "),
        (other_shape, r"norm.weight in .* has shape \[63\] where config.json makes it \[\d\d\]; config and weights "),
        (rewrite_config(model_type="llama"), r"has model_type llama; this reads gemma4, gemma4_unified, "),
        (
            no_config,
            r"config.json cannot be read \(No such file or directory\); give a folder with a Gemma 4 checkpoint\.$",
        ),
        (no_weights, r"holds no model.safetensors and no .*; give a folder with safetensors weights\.$"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named_with_the_file_and_the_fix(
    damage: Callable[[Path], None], message: str, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    report("Checkpoints that cannot be loaded", {"message": str(caught.value).replace(f"{tmp_path}/", "")})


def test_names_that_lead_nowhere_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"neither a folder nor a hub id such as .*; nearest name: gemma4_31b_it\.$"):
        resolve("gemma4_31bit")
    with pytest.raises(UserError, match="does not exist; give a folder with a tokenizer"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"google/gemma-4-E4B-it could not be fetched from the hub .*; log in and accept"
    ):
        resolve("gemma4_e4b_it")
