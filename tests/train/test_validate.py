"""The loss on what is held out: the same on every mesh, and without a trace in the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.batch import collate
from data.corpus.dataset import PackedDataset
from data.corpus.held_out import is_held_out
from model import Gemma4
from model.init import whole_slices
from parallel.apply import ParallelModel, build_parallel_model
from parallel.layout import Layout, resolve_layout
from parallel.world import World
from tests.harness.compare import hold
from tests.harness.corpus_files import texts
from tests.harness.distributed import run_ranks
from tests.harness.meshes import CPU, Case, initial_values, mesh_of, plans, sequences
from tests.harness.runs import overrides, records, train_on
from train.engine import Engine
from train.objective import CrossEntropy, cross_entropy
from train.validate import Validation

SIZES = (("vocab_size", 400), ("vocab_size_per_layer_input", 400))
MESHES: dict[int, tuple[tuple[str, Layout, dict[str, Any]], ...]] = {
    2: (
        ("e2b", Layout(dp_shard=2), {}),
        ("e2b", Layout(tp=2), {}),
        ("31b", Layout(cp=2), {"activation_checkpoint.mode": "full"}),
        ("e2b", Layout(pp=2), {}),
        ("31b", Layout(pp=2), {"parallel.pp_schedule": "interleaved"}),
        ("12b", Layout(pp=2), {"parallel.pp_schedule": "zero_bubble"}),
        ("26b_a4b", Layout(dp_shard=2, ep=2), {"moe.balance_loss": 0.1}),
    ),
    4: (("12b", Layout(pp=2, tp=2), {}), ("26b_a4b", Layout(dp_replicate=2, cp=2, ep=2), {})),
}
MOST, MICRO = 7, 2
"""Neither divides by the ranks."""


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Any:
    corpus = texts(tmp_path_factory.mktemp("texts"))
    chosen = is_held_out(corpus.shard.hashes, 0.3)

    def dataset(case: Case) -> PackedDataset:
        return PackedDataset(corpus, 48, 0, case.config, chosen)

    return dataset


@pytest.mark.parametrize("ranks", sorted(MESHES))
def test_every_mesh_measures_the_loss_of_one_process(ranks: int, held_out: Any) -> None:
    cases = [
        (Case(variant, layout, tuple(options.items()), SIZES), held_out) for variant, layout, options in MESHES[ranks]
    ]

    def on_rank(world: World) -> list[dict[str, float]]:
        found = []
        for case, _ in cases:
            layout = resolve_layout(world.size, case.layout, case.config, 48)
            parallel = build_parallel_model(
                case.config,
                mesh_of(layout),
                CPU,
                initial_values(0),
                plans(dict(case.options)),
                compute_dtype=case.dtype,
                sequence_length=48,
            )
            engine = Engine(parallel, CrossEntropy(), CPU)
            datasets = {"a": held_out(case), "b": held_out(case)}
            validation = Validation(datasets, MOST, engine, MICRO, layout.data_rank(world.rank))
            measured = validation.measure(lambda: True)
            assert measured is not None and measured == validation.measure(lambda: True)
            assert validation.measure(lambda last=world.rank + 1 == world.size: not last) is None  # type: ignore[misc]
            assert all(parameter.grad is None for parameter in parallel.model.parameters())
            assert all(not router.totals.any() for router in parallel.routers)
            found.append(measured | losses_of_sources(case, parallel, layout.data_rank(world.rank), layout.dp))
        return found

    for number, ((case, _), every) in enumerate(zip(cases, zip(*run_ranks(ranks, on_rank), strict=True), strict=True)):
        model = Gemma4(case.config).to(case.dtype)
        initial_values(0)(whole_slices(model))
        dataset = held_out(case)
        assert dataset.sequences_per_epoch > MOST
        with torch.no_grad():
            loss = cross_entropy(model, collate([dataset[i] for i in range(MOST)], case.config))
            alone = [cross_entropy(model, collate(sequences(case, 0)[source::2], case.config)) for source in (0, 1)]
        expected = float(loss.nll / loss.count)
        for measured in every:
            for source, loss in enumerate(alone):
                assert measured.pop(f"source_count/{source}") == loss.count > 0
                error = abs(measured.pop(f"source_loss/{source}") / float(loss.nll) - 1)
                hold("loss of each source on meshes, float64", error, 1e-10, (number, case.layout))
            assert set(measured) == {"validation_loss", "validation_loss/a", "validation_loss/b"}
            for value in measured.values():
                hold("validation loss on meshes, float64", abs(value / expected - 1), 1e-10, (number, case.layout))


def losses_of_sources(case: Case, parallel: ParallelModel, rank: int, ranks: int) -> dict[str, float]:
    """Sums over all ranks of rows that belong to one source or the other in turn."""
    rows = [replace(row, source=number % 2) for number, row in enumerate(sequences(case, 0))]
    own = rows[rank * len(rows) // ranks : (rank + 1) * len(rows) // ranks]
    batches = [collate(own[: len(own) // 2], case.config), collate(own[len(own) // 2 :], case.config)]
    sums = Engine(parallel, CrossEntropy(), CPU, num_sources=2).forward(batches)
    reduced = torch.stack([*sums.values()])
    dist.all_reduce(reduced)
    return {name: float(value) for name, value in zip(sums, reduced, strict=True) if name.startswith("source_")}


def test_measuring_changes_nothing_of_a_run(tmp_path: Path) -> None:
    shared = ["data.held_out=0.2", "train.steps=4", "train.validate_sequences=4"]
    every = train_on(2, overrides(tmp_path, *shared, "train.validate_every=2", run="every"))
    never = train_on(2, overrides(tmp_path, *shared, "train.validate_every=0", run="never"))
    assert all(torch.equal(every[name], never[name]) for name in never)
    told = [(r["loss"], r["grad_norm"]) for r in records(tmp_path / "every")]
    assert told == [(r["loss"], r["grad_norm"]) for r in records(tmp_path / "never")]
    lines = [json.loads(line) for line in (tmp_path / "every" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4] and not (tmp_path / "never" / "validation.jsonl").exists()
    assert lines[0]["validation_loss"] > lines[1]["validation_loss"] > lines[2]["validation_loss"]


def test_a_run_goes_on_with_the_same_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On another number of ranks, the losses on what is held out are those of a run that was not interrupted."""
    shared = ["data.held_out=0.2", "train.validate_every=2", "train.validate_sequences=4", "train.micro_batch_size=2"]
    train_on(1, overrides(tmp_path, *shared, "train.steps=4", "schedule.name=constant", run="whole"))
    train_on(2, overrides(tmp_path, *shared, "train.steps=2", "schedule.name=constant", run="parts"))
    train_on(1, overrides(tmp_path, *shared, "train.steps=4", "schedule.name=constant", run="parts"))
    whole, parts = (
        [json.loads(line) for line in (tmp_path / run / "validation.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    assert [line["step"] for line in whole] == [line["step"] for line in parts] == [0, 2, 4]
    for one, other in zip(whole, parts, strict=True):
        assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
