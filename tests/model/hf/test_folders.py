"""Folders that hold more, or something else, than a released checkpoint: used, named or refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ConfigError, Gemma4Config, UserError
from model.hf.hub import load_model, resolve
from model.hf.weights import INDEX, SINGLE, Weights
from tests.harness.fuzz import VALUES
from tests.harness.multimodal import random_whole_config, save_reference, whole_reference


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    save_reference(whole_reference(random_whole_config("e4b", 0), 0), folder)
    return folder


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "model"))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("model*.safetensors") for key, tensor in load_file(file).items()}


def one_file(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for file in [*folder.glob("model*.safetensors"), folder / INDEX]:
        file.unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_a_new_file_beside_older_shards_is_what_transformers_opens_too(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = all_tensors(folder)
    name = "model.language_model.norm.weight"
    tensors[name] = torch.full_like(tensors[name], 7.0)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"")
    model = load_model(folder)
    assert bool((model.state_dict()["language_model.norm.weight"] == 7).all())
    assert len(caplog.messages) == 1
    assert "read from model.safetensors; consolidated.safetensors, model-00001" in caplog.messages[0]


def test_fields_that_nothing_reads_are_named_or_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = json.loads((folder / "config.json").read_text())
    load_model(folder)
    assert not caplog.messages  # all that transformers writes has a meaning here, or none anywhere
    raw["head_dims"], raw["text_config"]["rope_interleaved"], raw["audio_config"]["sampling_rate"] = 1, True, 8000
    (folder / "config.json").write_text(json.dumps(raw))
    load_model(folder)
    named = "config.json has head_dims, text_config.rope_interleaved, audio_config.sampling_rate, which nothing reads"
    assert caplog.messages == [f"{folder}: {named}"]
    with pytest.raises(UserError, match=rf"holds what nothing reads \({named}\); drop it, or set model\.strict=false"):
        Weights(folder, Gemma4Config.from_hf(folder), strict=True)


def test_a_head_of_its_own_is_refused_and_a_copy_of_the_table_is_not(folder: Path) -> None:
    tensors = all_tensors(folder)
    table = "model.language_model.embed_tokens.weight"
    one_file(folder, tensors | {"lm_head.weight": tensors[table].clone()})
    load_model(folder)
    other = tensors[table].clone()
    other[-1, -1] += 1
    one_file(folder, tensors | {"lm_head.weight": other})
    with pytest.raises(UserError, match=r"lm_head\.weight in .* is another matrix than .*embed_tokens\.weight"):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_other_prefixes_are_named(prefix: str, folder: Path) -> None:
    one_file(folder, {prefix + key: tensor for key, tensor in all_tensors(folder).items()})
    with pytest.raises(UserError, match=rf"has {prefix}.* where .* is read; its keys have other prefixes") as caught:
        load_model(folder)
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "quantization_config", {"load_in_4bit": True}, "has a quantization_config"),
        ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}, "has rope_scaling="),
        ("vision_config", "attention_dropout", 0.1, "vision_config.attention_dropout=0.1; every Gemma 4 has 0.0"),
        ("text_config", "attention_bias", True, "attention_bias=True; every Gemma 4 has False"),
    ],
)
def test_what_would_change_the_result_is_refused(
    section: str | None, key: str, value: Any, message: str, folder: Path
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (raw if section is None else raw[section])[key] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        Gemma4Config.from_hf(folder)


def test_a_run_is_its_newest_export(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    (run / "checkpoints" / "step_00000004" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a run without an export; make one: gemwright export run="):
        resolve(str(run))
    with pytest.raises(UserError, match=r"is a checkpoint of a run; go on from it with run\.resume="):
        resolve(str(run / "checkpoints" / "step_00000004"))
    for step in (2, 10):
        place = run / "export" / f"step_{step:08d}"
        shutil.copytree(folder, place)
        (place / "gemwright_export.json").write_text("{}")
    assert resolve(str(run)) == run / "export" / "step_00000010"


def test_tables_that_transformers_made_larger_are_read(tmp_path: Path) -> None:
    reference = whole_reference(random_whole_config("e4b", 0), 0)
    pieces = reference.get_input_embeddings().weight.shape[0] + 8
    reference.resize_token_embeddings(pieces)
    save_reference(reference, tmp_path)
    model = load_model(tmp_path)
    assert (model.config.vocab_size, model.config.vocab_size_per_layer_input) == (pieces, pieces)
    tokens = torch.arange(pieces - 8, pieces)[None]
    with torch.no_grad():
        expected = reference.eval()(input_ids=tokens).logits
        torch.testing.assert_close(model.logits(model(tokens)), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model; merge it into its model"):
        resolve(str(tmp_path))


def test_any_value_of_any_key_of_a_config_is_used_or_refused_in_one_line(folder: Path) -> None:
    draw, whole, used = random.Random(0), json.loads((folder / "config.json").read_text()), 0
    for _ in range(500):
        raw = json.loads(json.dumps(whole))
        holder = draw.choice([raw, raw["text_config"], raw["vision_config"], raw["audio_config"]])
        key = draw.choice([*holder, "other"])
        holder[key] = draw.choice(VALUES)
        (folder / "config.json").write_text(json.dumps(raw))
        try:
            Gemma4Config.from_hf(folder)
            used += 1
        except UserError as error:
            if "\n" in str(error):
                pytest.fail(f"{key}={holder[key]!r}: {error}")
    assert 100 < used < 490
