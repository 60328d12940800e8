"""Moments in 16 and 8 bits: how near they are, the same on every mesh, and what they save and cost."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import Gemma4, Gemma4Config
from parallel.layout import Layout
from tests.harness.compare import hold, relative_error
from tests.harness.meshes import Case, Errors, run_all
from tests.harness.report import report
from tests.harness.runs import losses, overrides, train_on
from train.config import OptimizerConfig
from train.moments import Moment, block_size, bytes_a_number, chunks, is_narrowed, turns
from train.optimizer import build_optimizer

DTYPES = ("bfloat16", "float8")
ALL = slice(None)


def kept(moment: Moment, values: Tensor, parameter: Tensor, step: int) -> Tensor:
    """The values as they are read after a step."""
    moment.write(ALL, values, turns(parameter, ALL, torch.tensor(float(step))))
    return moment.read(ALL, values.dtype)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize(("dtype", "fraction"), [("bfloat16", 7), ("float8", 3)])
def test_a_moment_is_near_at_once_and_nearer_on_average(dtype: str, fraction: int, squares: bool) -> None:
    torch.manual_seed(0)
    parameter = torch.zeros(48, 704)
    moment = Moment(parameter, "m", dtype, squares=squares)
    assert not moment.read(ALL, torch.float32).any(), "it begins at zero"
    values = torch.randn(48, 704) * torch.logspace(-12, 0, 48)[:, None]
    values = values.square() if squares else values
    root = torch.sqrt if squares else torch.clone
    found = torch.stack([root(kept(moment, values, parameter, step)) for step in range(1, 65)])
    expected = root(values)
    # A row's least numbers are too small a share of its largest: within 2^-15 of that.
    largest = expected.abs().unflatten(-1, (-1, moment.block)).amax(-1, keepdim=True).expand(-1, -1, moment.block)
    least = largest.flatten(-2) * 2.0**-14 if dtype == "float8" else 0.0
    place = 2.0 ** -(fraction + (dtype == "float8" and squares))
    error = ((found - expected).abs() - least) / expected.abs()
    hold(f"a moment in {dtype}, largest error", float(error.max()), place, squares)
    # 64 steps of an even sequence hit a share of a place within 2/64 of one.
    hold(f"a moment in {dtype}, on average", relative_error(found.mean(0), expected), place / 32, squares)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slow_decay_is_not_lost(dtype: str) -> None:
    """At 0.1 % a step, which is less than half of a last place, rounding to the nearest would never move."""
    torch.manual_seed(0)
    parameter, first = torch.zeros(32, 704), torch.rand(32, 704)
    for squares in (False, True):
        moment = Moment(parameter, "m", dtype, squares=squares)
        values = kept(moment, first, parameter, 0)
        for step in range(1, 1001):
            values = kept(moment, 0.999 * values, parameter, step)
        error = abs(float(values.sum() / first.sum()) / 0.999**1000 - 1)
        hold(f"a moment in {dtype} after 1,000 steps of 0.999", error, 2e-3, squares)


def test_a_block_lies_within_any_split_of_a_row() -> None:
    for width in (704, 1536, 2112, 2560, 2816, 3840, 5376, 8192, 8960, 10240, 15360, 21504):
        assert 32 <= block_size(width) <= 64
        for parts in (2, 3, 4, 6, 8, 12, 16):
            assert width % parts or (width // parts) % block_size(width) == 0, (width, parts)


@pytest.mark.parametrize("variant", ["tiny_e2b", "tiny_26b_a4b"])
def test_state_takes_the_bytes_that_are_counted_for_it(variant: str) -> None:
    config = Gemma4Config.from_name(variant, hidden_size=256)
    model = Gemma4(config)
    taken = {}
    for dtype in ("float32", *DTYPES):
        for name in ("adamw", "muon"):
            optimizer = build_optimizer(model, OptimizerConfig(name, dtype))
            counted = sum(
                bytes_a_number(parameter, dtype, 4) * parameter.numel() * (1 if "momentum" in state else 2)
                for parameter, state in ((p, "".join(optimizer.state[p])) for p in model.parameters())
            )
            tensors = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
            taken[name, dtype] = sum(t.nbytes for t in tensors)
            assert taken[name, dtype] == counted
    for name in ("adamw", "muon"):
        full = taken[name, "float32"]
        report(
            "Bytes of optimizer state, beside float32",
            {"variant": variant, "optimizer": name, **{d: f"{taken[name, d] / full:.3f}" for d in DTYPES}},
        )
        assert taken[name, "bfloat16"] < 0.51 * full and taken[name, "float8"] < 0.4 * full
    assert not is_narrowed(torch.zeros(4096), "float8"), "vectors are few, and stay"
    assert not is_narrowed(torch.zeros(64, 3, 16, 16), "float8"), "filters too"


def test_rows_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found = []
    for size in (1 << 22, 1000):
        monkeypatch.setattr("train.moments._CHUNK", size)
        parameter = nn.Parameter(torch.linspace(-1, 1, 7 * 40 * 128).view(7, 40, 128))
        optimizer = build_optimizer(nn.ParameterDict({"w": parameter}), OptimizerConfig(state_dtype="float8"))
        assert len([*chunks(parameter)]) == (1 if size > 1000 else 40)
        for step in range(3):
            parameter.grad = torch.randn(7, 40, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        found.append(parameter.detach().clone())
    assert torch.equal(*found)


WIDE = (("hidden_size", 128), ("intermediate_size", 192))
MESHES = {
    "dp_shard 2": Case("e4b", Layout(dp_shard=2)),
    "pp 2": Case("31b", Layout(pp=2)),
    "tp 2": Case("12b", Layout(tp=2)),
    "hsdp 2 x 2": Case("e2b", Layout(dp_replicate=2, dp_shard=2)),
    "dp_shard 2 x tp 2 x ep 4": Case("26b_a4b", Layout(dp_shard=2, tp=2, ep=4)),
    "cp 2 x tp 2, offloaded": Case("31b", Layout(cp=2, tp=2), (("parallel.cpu_offload", True),)),
}


@cache
def on_ranks(ranks: int) -> dict[tuple[str, str], Errors]:
    named = {
        (name, dtype): replace(case, sizes=WIDE, state_dtype=dtype, optimizer=optimizer, steps=4)
        for name, case in MESHES.items()
        for dtype, optimizer in zip(DTYPES, ("adamw", "adamw") if "ep" not in name else ("adamw", "muon"), strict=True)
        if case.layout.world_size == ranks
    }
    return dict(zip(named, run_all(list(named.values())), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_moves_no_number(mesh: str, dtype: str) -> None:
    case = MESHES[mesh]
    found = on_ranks(case.layout.world_size)[mesh, dtype]
    found.hold("state of fewer bits on meshes against one process", case.dtype, mesh, dtype, case.variant)


def test_a_run_goes_on_on_other_ranks_and_in_no_other_dtype(tmp_path: Path) -> None:
    given = ("train.steps=6", "checkpoint.every=3", "run.dtype=float64", "optimizer.state_dtype=float8")
    first = overrides(tmp_path, *given)
    train_on(2, first)
    run = tmp_path / "run"
    expected = losses(run)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    train_on(1, first)
    error = max(abs(a - b) / b for a, b in zip(losses(run), expected, strict=True))
    hold("state in float8 resumed on other ranks, float64: loss", error, 1e-10)
    with pytest.raises(AssertionError, match=r"of optimizer\.state_dtype=float8, this run is by float32; use"):
        train_on(1, [*first, "optimizer.state_dtype=float32", "train.steps=8"])


def test_the_loss_falls_as_by_whole_numbers(tmp_path: Path) -> None:
    ends = (10, 20)
    for name, dtypes in (("adamw", DTYPES), ("muon", DTYPES[1:])):
        found = {}
        for dtype in ("float32", *dtypes):
            words = (f"optimizer.name={name}", f"optimizer.state_dtype={dtype}", "optimizer.lr=1e-2")
            run = f"{name}_{dtype}"
            train_on(1, overrides(tmp_path, "train.steps=20", "optimizer.beta2=0.999", *words, run=run))
            found[dtype] = [sum(losses(tmp_path / run)[end - 5 : end]) / 5 for end in ends]
            steps = {f"to step {end}": f"{loss:.3f}" for end, loss in zip(ends, found[dtype], strict=True)}
            report("Mean loss of five steps, by what keeps the moments", {"optimizer": name, "state": dtype, **steps})
        for dtype in dtypes:
            worst = max(abs(a / b - 1) for a, b in zip(found[dtype], found["float32"], strict=True))
            hold(f"loss with moments in {dtype} beside whole ones", worst, 0.02, name)
