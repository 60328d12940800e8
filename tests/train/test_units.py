"""Schedules, parameter groups, operation counts, metrics and trackers."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.batch import IGNORE, Batch
from model import Gemma4, Gemma4Config
from model.encoders.config import AudioConfig, VisionConfig
from model.inputs import make_inputs
from model.masks import attention_mask
from tests.harness.multimodal import make_example
from tests.harness.runs import losses, overrides, train_on
from train.config import OptimizerConfig, ScheduleConfig
from train.flops import media_flops, training_flops
from train.metrics import Meter, step_line
from train.optimizer import build_optimizer
from train.schedule import learning_rate


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 99: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 51: 0.1 + 0.9 * 48 / 96, 99: 0.1}),
        ("cosine", {3: 1.0, 51: 0.1 + 0.9 * 0.5, 99: 0.1}),
        ("wsd", {3: 1.0, 50: 1.0, 79: 1.0, 89: 0.1 + 0.9 * 0.5, 99: 0.1}),
    ],
)
def test_schedules(name: str, expected: dict[int, float]) -> None:
    config = ScheduleConfig(name=name, warmup_steps=4, decay_steps=20, final_lr_ratio=0.1)
    for step, ratio in expected.items():
        assert learning_rate(config, 2.0, step, 100) == pytest.approx(2.0 * ratio, rel=1e-9), step


def test_default_warm_up_is_a_twentieth_and_no_rate_is_zero_before_the_end() -> None:
    config = ScheduleConfig(name="cosine", final_lr_ratio=0.0)
    rates = [learning_rate(config, 1.0, step, 100) for step in range(100)]
    assert rates[4] == 1.0 and rates[0] == pytest.approx(0.2)
    assert all(rate > 0 for rate in rates[:-1]) and rates[-1] == 0


@pytest.mark.parametrize("variant", ["tiny_e4b", "tiny_12b"])
def test_norms_scalars_and_embeddings_do_not_decay(variant: str) -> None:
    model = Gemma4(Gemma4Config.from_name(variant))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        matrices = ("proj.", "projection.", "_gate", "linear", "ffw_layer", "conv.", "conv1d.", "post.", "dense")
        matrix = name.endswith("weight") and any(m in name for m in matrices) and "norm" not in name
        assert value == (0.3 if matrix else 0.0), name


@pytest.mark.parametrize("variant", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
@pytest.mark.parametrize("few", [False, True])
def test_counted_operations_equal_those_of_the_matrix_products(variant: str, few: bool) -> None:
    """Everything but attention is counted by torch's own counter; scores are added by their number."""
    config = Gemma4Config.from_name(f"gemma4_tiny_{variant}", vocab_size=300, vocab_size_per_layer_input=300)
    model = Gemma4(config)
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 300, (2, 96))
    labels = tokens.clone()
    if few:
        labels[:, :80] = -100
    ids = (torch.arange(96) // 60).expand(2, 96)
    batch = Batch.make(config, tokens, labels, torch.zeros_like(tokens), ids)
    supervised = labels != IGNORE
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens, document_ids=ids, supervised=supervised))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if op is torch.ops.aten.mm or op is torch.ops.aten.addmm)
    if config.enable_moe_block:
        assert config.top_k_experts and config.moe_intermediate_size
        rows = sum(
            int(supervised.sum()) if i >= config.first_kv_shared_layer - 1 else tokens.numel()
            for i in range(config.num_hidden_layers)
        )
        products += rows * config.top_k_experts * 6 * config.hidden_size * config.moe_intermediate_size
    scores = 0
    for i in range(config.num_hidden_layers):
        layer = config.layer(i)
        mask = attention_mask(2, 96, window=layer.window, document_ids_BS=ids)
        if i >= config.first_kv_shared_layer - 1:
            mask = mask.select(supervised.flatten().nonzero()[:, 0])
        scores += 4 * int(mask.dense().sum()) * config.num_attention_heads * layer.head_dim
    assert training_flops(config, batch.inputs) == 3 * (products + scores)


@pytest.mark.parametrize("variant", ["e4b", "12b", "31b"])
def test_counted_operations_of_encoders_equal_those_of_their_products(variant: str) -> None:
    """Convolutions and products by torch's counter; scores, which its windows hide, by their number."""
    config = Gemma4Config.from_name(f"gemma4_tiny_{variant}")
    rows: list[list[Any]] = [[("image", 2, 2), ("video", [(1, 3), (2, 1)])]]
    frames = (49, 50)  # the convolutions pad clips to one length, which is not counted
    rows[0] += [("audio", count) for count in frames] if config.audio else []
    example = make_example(config, rows, seed=0)
    assert example.media is not None
    model = Gemma4(config)
    model.init_weights(torch.Generator().manual_seed(0))
    inputs, counted = make_inputs(config, example.tokens_BS), []
    for media in (example.media, None):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.embed(replace(inputs, media=media))
        operations = counter.get_flop_counts().get("Global", {})
        counted.append(sum(n for op, n in operations.items() if op is not torch.ops.aten.bmm))
    expected = counted[0] - counted[1]
    if isinstance(config.vision, VisionConfig):
        width = config.vision.num_attention_heads * config.vision.head_dim
        assert example.media.vision is not None
        pairs = sum(length**2 for length in example.media.vision.lengths)
        expected += config.vision.num_hidden_layers * 4 * pairs * width
    if isinstance(config.audio, AudioConfig):
        counts = [config.audio.num_tokens(n) for n in frames]
        pairs = sum(sum(min(i + 1, 12) for i in range(count)) for count in counts)
        expected += config.audio.num_hidden_layers * 6 * pairs * config.audio.hidden_size
        # The tower multiplies the relative table once for all clips.
        expected += 2 * config.audio.num_hidden_layers * 12 * config.audio.hidden_size**2
    frozen = (("vision_tower", "vision_embedder", "embed_vision"), ("audio_tower", "embed_audio"))
    found = sum(media_flops(config, example.media, names) for names in frozen)
    assert found / 4 == pytest.approx(expected, rel=1e-3)


def test_released_sizes_cost_six_operations_per_active_parameter_and_token() -> None:
    active = {"31b": 30_697_345_280, "26b_a4b": 3_822_530_560}
    for name, parameters in active.items():
        config = Gemma4Config.from_name(f"gemma4_{name}")
        tokens = torch.zeros(1, 2, dtype=torch.long)
        inputs = Batch.make(config, tokens, tokens, tokens, tokens).inputs
        assert training_flops(config, inputs) / (6 * 2 * parameters) == pytest.approx(1.0, abs=2e-3)


def test_the_meter_counts_what_happened_between_log_points() -> None:
    meter = Meter(world_size=2, steps=10, peak_flops=1e9, device=torch.device("cpu"), started=0.0)
    meter.add(tokens=1000, flops=4_000_000, data_seconds=0.5)
    meter.add(tokens=1000, flops=4_000_000, data_seconds=0.1)
    import time

    meter.started = time.perf_counter() - 2.0
    record = meter.record(4, {"loss": 1.0, "grad_norm": 2.0, "lr": 1e-3})
    assert record["tokens_per_second"] == pytest.approx(1000, rel=0.05)
    assert record["tokens_per_second_per_device"] == pytest.approx(500, rel=0.05)
    assert record["mfu"] == pytest.approx(2e6 / 1e9, rel=0.1)
    assert record["data_seconds"] == 0.3 and record["eta_seconds"] == pytest.approx(6.0, rel=0.05)
    assert meter.tokens == 0
    assert step_line(record, 10).startswith(
        "step  4/10 | loss 1.0000 | grad_norm 2.000 | lr 1.00e-03 | tokens/s/device"
    )


def read_offline_run(folder: Path) -> list[dict[str, Any]]:
    """Records of an offline W&B run, by W&B's own reader."""
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    out = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in out.stdout.splitlines()]


def test_an_offline_wandb_run_reads_back_and_keeps_its_id(tmp_path: Path) -> None:
    options = ["trackers.wandb.mode=offline", "train.sample_every=2", "train.sample_tokens=3", "checkpoint.every=2"]
    train_on(1, overrides(tmp_path, *options, "train.steps=2"))
    run = tmp_path / "run"
    records = read_offline_run(run)
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scalars = [h for h in history if "train/loss" in h]
    assert [(h["progress/step"], h["train/loss"]) for h in scalars] == [(r["step"], r["loss"]) for r in logged]
    assert {"train/grad_norm", "train/lr", "speed/mfu", "memory/peak_memory_gib", "progress/tokens_seen"} <= set(
        scalars[0]
    )
    start = next(r["run"] for r in records if r["type"] == "run")
    assert start["run_id"] == (run / "wandb_run_id.txt").read_text()
    assert start["config"]["update"]["train"]["steps"] == 2
    (table,) = run.glob("wandb/offline-run-*/files/media/table/samples/*.json")
    assert json.loads(table.read_text())["columns"] == ["step", "prompt", "text"]

    first = run.joinpath("wandb").rename(tmp_path / "first")
    assert first.exists()
    train_on(1, overrides(tmp_path, *options, "train.steps=4"))
    again = read_offline_run(run)
    assert next(r["run"] for r in again if r["type"] == "run")["run_id"] == start["run_id"]
    items = [r["history"]["item"] for r in again if r["type"] == "history"]
    assert [item["progress/step"] for item in items] == [3, 4]
    assert [item["_step"] for item in items] == [3, 4], "both folders sync into one run, whose steps go on"
    assert "samples/text" in str(items[-1])

    run.joinpath("wandb").rename(tmp_path / "second")
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    train_on(1, overrides(tmp_path, *options, "train.steps=5"))
    redone = read_offline_run(run)
    items = [r["history"]["item"] for r in redone if r["type"] == "history"]
    assert [item["_step"] for item in items] == [3, 4, 5], "steps that are done again keep their numbers"
    assert next(r["run"] for r in redone if r["type"] == "run")["run_id"] == start["run_id"]


def test_a_profile_has_a_trace_of_each_rank_and_a_table_of_parts(tmp_path: Path) -> None:
    """The third step is recorded, and the numbers of the run are those without."""
    for name in ("true", "false"):
        folder = tmp_path / name
        folder.mkdir()
        train_on(2, overrides(folder, "train.steps=4", f"train.profile={name}"))
    profile = tmp_path / "true" / "run" / "profile"
    names = sorted(path.name for path in profile.iterdir())
    assert names == ["table.txt", "trace_rank_0.json.gz", "trace_rank_1.json.gz"]
    rows = {line[:40].strip(): line[40:].split() for line in (profile / "table.txt").read_text().splitlines()}
    for part in ("data", "exchange", "forward_backward", "clip", "optimizer"):
        assert float(rows[part][0]) >= 0 and rows[part][-1] == "1"
    assert rows["module DecoderLayer"][-1] == rows["module MLP"][-1] == "4", "one micro-batch through four layers"
    assert float(rows["module DecoderLayer"][0]) > float(rows["module MLP"][0]) > 0
    with gzip.open(profile / "trace_rank_1.json.gz", "rt") as trace:
        assert any(event.get("name") == "optimizer" for event in json.load(trace)["traceEvents"])
    assert losses(tmp_path / "true" / "run") == losses(tmp_path / "false" / "run")
    assert not (tmp_path / "false" / "run" / "profile").exists()
