"""The checks of a GPU: on one where there is one, and everywhere a dry run with the kernels of the CPU."""

from __future__ import annotations

import pytest
import torch

from launch.benchmarks import gpu
from launch.benchmarks.gpu import CHECKS, verdict
from launch.benchmarks.place import Place, Wrong, near

CPU = Place(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str) -> None:
    assert verdict(name, Place(torch.device("cuda"))).wrong is None


@pytest.mark.parametrize("name", CHECKS)
def test_a_dry_run_passes(name: str) -> None:
    assert verdict(name, CPU).wrong is None


def test_what_is_wrong_is_a_verdict_and_the_next_check_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(place: Place) -> gpu.Found:
        return {"never": near("value", torch.ones(2), torch.zeros(2), 1e-3)}

    def broken(place: Place) -> gpu.Found:
        raise RuntimeError("No valid triton configs.\nRequired: 263168")

    monkeypatch.setattr(gpu, "CHECKS", {"off": off, "broken": broken, "norm": gpu.norm})
    with pytest.raises(SystemExit) as ended:
        gpu.checks(gpu.Options(what=["off", "broken", "norm"], device="cpu"))
    said = capsys.readouterr().out
    assert ended.value.code == 2
    assert "WRONG: value is off by" in said and "WRONG: RuntimeError: No valid triton configs. Required: 263168" in said
    assert "norm" in said and "ok" in said


def test_a_number_that_is_none_is_off() -> None:
    with pytest.raises(Wrong, match="value is off by nan"):
        near("value", torch.tensor([float("nan")]), torch.ones(1), 1e-3)


def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.checks(gpu.Options())
    assert capsys.readouterr().out == "skipped: no GPU here; device=cpu makes a dry run\n"
