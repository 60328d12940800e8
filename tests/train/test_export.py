"""A checkpoint of `transformers` through a sharded model and out again: the same bytes, and it opens there."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4UnifiedForConditionalGeneration

from model import Gemma4Config, UserError
from model.hf.weights import Weights
from parallel.apply import build_parallel_model
from parallel.layout import Layout, nearest_layout
from parallel.mesh import build_mesh
from parallel.world import World
from tests.harness.distributed import run_ranks
from tests.harness.multimodal import make_example, random_whole_config, save_reference, whole_reference
from tests.harness.reference import (
    FAMILIES,
    perturbed_reference,
    random_config,
)
from train.checkpoint import Checkpointer
from train.config import OptimizerConfig
from train.export import MANIFEST, export
from train.optimizer import build_optimizer
from train.origin import Origin

CPU = torch.device("cpu")


def import_and_save(source: Path, run: Path, world: World) -> None:
    """Stream a released checkpoint into a model sharded over these ranks, and write a training checkpoint of it."""
    config = Gemma4Config.from_hf(source)
    weights = Weights(source, config)
    wanted = {4: Layout(pp=2, tp=2, ep=2)}.get(world.size, Layout(dp_shard=world.size))
    layout = nearest_layout(world.size, wanted, config, 64, free=False)
    assert layout is not None and (layout.tp == layout.pp == 2 or world.size < 4)
    model = build_parallel_model(config, build_mesh(CPU, layout), CPU, weights.fill).model
    if world.rank == 0:
        Origin.remember(run / "origin", source, {name: entry.dtype for name, entry in weights.entries.items()})
        (run / "checkpoints").mkdir()
    torch.distributed.barrier()
    optimizer = build_optimizer(model, OptimizerConfig())
    Checkpointer(run / "checkpoints", keep=1, asynchronous=False).save(1, model, optimizer, {})


def through_ranks(source: Path, run: Path, ranks_in: int, ranks_out: int, **options: Any) -> Path:
    run.mkdir()
    run_ranks(ranks_in, lambda world: import_and_save(source, run, world))

    def export_on(world: World) -> None:
        export(
            run / "checkpoints" / "step_00000001",
            run / "export",
            Gemma4Config.from_hf(source),
            origin=run / "origin",
            **options,
        )

    run_ranks(ranks_out, export_on)
    return run / "export"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def assert_same_bytes(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        other = second[key]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("ranks", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_is_byte_identical_and_opens_in_the_reference(
    family: str, ranks: tuple[int, int], tmp_path: Path
) -> None:
    config = random_whole_config(family, seed=3)
    reference = whole_reference(config, seed=3)
    if ranks == (4, 2):
        reference.bfloat16()  # as released; only the bytes matter here
    save_reference(reference, tmp_path / "source")
    out = through_ranks(tmp_path / "source", tmp_path / "run", *ranks, file_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_same_bytes(tmp_path / "source", out)

    cls: Any = Gemma4UnifiedForConditionalGeneration if family == "12b" else Gemma4ForConditionalGeneration
    experts = {"experts_implementation": "eager"} if family == "26b_a4b" else {}
    again, info = cls.from_pretrained(
        out, dtype="auto", attn_implementation="eager", output_loading_info=True, local_files_only=True, **experts
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert Gemma4Config.from_hf(out) == config
    if ranks == (1, 1):
        example = make_example(config, [[4, ("image", 2, 2), 6]], seed=1)
        inputs: dict[str, Any] = {"input_ids": example.tokens_BS, "use_cache": False, **example.reference}
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, reference(**inputs).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["e2b", "26b_a4b", "31b"])
def test_a_text_only_checkpoint_comes_back_byte_identical(family: str, tmp_path: Path) -> None:
    reference = perturbed_reference(random_config(family, 4), 4)
    save_reference(reference, tmp_path / "source")
    out = through_ranks(tmp_path / "source", tmp_path / "run", 2, 1)
    assert_same_bytes(tmp_path / "source", out)
    experts: dict[str, Any] = {"experts_implementation": "eager"} if family == "26b_a4b" else {}
    again = Gemma4ForCausalLM.from_pretrained(
        out, dtype="auto", attn_implementation="eager", local_files_only=True, **experts
    )
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = again(tokens, use_cache=False).logits, reference(tokens, use_cache=False).logits
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)  # the reference's experts vary with memory alignment


def test_the_manifest_names_every_tensor_and_both_spellings_are_written(tmp_path: Path) -> None:
    config = random_whole_config("31b", seed=5)
    save_reference(whole_reference(config, seed=5), tmp_path / "source")
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(raw | {"of_their_own": 7}))
    out = through_ranks(tmp_path / "source", tmp_path / "run", 1, 1, dtype="bfloat16")
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["tensors"].keys() == tensors(out).keys()
    assert {entry["dtype"] for entry in manifest["tensors"].values()} == {"bfloat16"}
    written = json.loads((out / "config.json").read_text())
    text = written["text_config"]
    assert written["of_their_own"] == 7 and written["dtype"] == "bfloat16"
    assert text["global_head_dim"] == config.global_head_dim
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert [int(index) for index in text["per_layer_config"]] == full
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).is_file()


def test_an_export_is_made_once_and_overwrites_nothing_unasked(tmp_path: Path) -> None:
    save_reference(whole_reference(random_whole_config("31b", seed=5), seed=5), tmp_path / "source")
    out = through_ranks(tmp_path / "source", tmp_path / "run", 1, 1)
    config = Gemma4Config.from_hf(tmp_path / "source")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    weights = out / "model.safetensors"
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}
    before = weights.stat().st_mtime_ns
    assert export(checkpoint, out, config) == out and weights.stat().st_mtime_ns == before  # of this very checkpoint

    other = Path(shutil.copytree(checkpoint, tmp_path / "step_00000002"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"of": "another run"}))
    with pytest.raises(UserError, match=r"holds the export of another checkpoint; choose another folder"):
        export(other, out, config)
    assert weights.stat().st_mtime_ns == before
    export(other, out, config, replace=True)
    assert weights.stat().st_mtime_ns > before
    assert not list(tmp_path.glob("**/.*partial"))


def test_a_failure_on_one_rank_stops_all_and_leaves_nothing(tmp_path: Path) -> None:
    save_reference(whole_reference(random_whole_config("31b", seed=5), seed=5), tmp_path / "source")
    out = through_ranks(tmp_path / "source", tmp_path / "run", 2, 1)
    shutil.rmtree(out)
    config = Gemma4Config.from_hf(tmp_path / "source")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"

    def full(world: World) -> str:
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(UserError) as caught:
            export(checkpoint, out, config, file_bytes=50_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return str(caught.value)

    messages = run_ranks(2, full)
    assert messages[0] == messages[1] and "File too large" in messages[0] and "mend it and export again" in messages[0]
    assert not out.exists() and not list(tmp_path.glob("run/.*partial"))

    def unreadable(world: World) -> str:
        torch.distributed.barrier()
        seen = checkpoint if world.rank == 0 else tmp_path / "nowhere"
        with pytest.raises(UserError, match="nowhere"):
            export(seen, out, config)
        return "stopped"

    assert run_ranks(2, unreadable) == ["stopped"] * 2
    assert not out.exists() and not list(tmp_path.glob("run/.*partial"))
