"""Every mesh gives the numbers of one process: five optimizer steps, losses and parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.report import report
from tests.runs import losses, overrides, train_on

VARIANTS = ("tiny_e2b", "tiny_e4b", "tiny_12b", "tiny_26b_a4b", "tiny_31b")

MESHES: dict[str, tuple[int, tuple[str, ...]]] = {
    "2 ranks": (2, ()),
    "4 ranks": (4, ()),
    "hsdp 2x2": (4, ("parallel.dp_replicate=2",)),
    "1 rank, accumulation 4": (1, ("train.micro_batch_size=2",)),
    "2 ranks, accumulation 4": (2, ("train.micro_batch_size=1",)),
    "2 ranks, accumulation 4, sync every": (2, ("train.micro_batch_size=1", "parallel.gradient_sync=every")),
    "hsdp 2x2, accumulation 2": (4, ("parallel.dp_replicate=2", "train.micro_batch_size=1")),
    "2 ranks, kept gathered": (2, ("parallel.reshard_after_forward=false",)),
    "2 ranks, cpu offload": (2, ("parallel.cpu_offload=true",)),
    "2 ranks, recompute": (2, ("activation_checkpoint.mode=full",)),
    "2 ranks, selective": (2, ("activation_checkpoint.mode=selective",)),
    "2 ranks, recompute every 3rd": (2, ("activation_checkpoint.mode=full", "activation_checkpoint.every=3")),
}
# Routing is a choice: rounding that swaps two near-equal experts changes a token's output at once, and after a few
# steps there is such a token. With every expert chosen, only sums are left to differ.
EXTRA = {"tiny_26b_a4b": ("model.top_k_experts=16",)}
CASES = [("tiny_e4b", mesh) for mesh in MESHES] + [
    (variant, mesh) for variant in VARIANTS if variant != "tiny_e4b" for mesh in ("2 ranks, recompute", "hsdp 2x2")
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    found = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp(variant)
        parameters = train_on(1, overrides(folder, f"+variant={variant}", *EXTRA.get(variant, ())))
        found[variant] = losses(folder / "run"), parameters
    return found


@pytest.mark.parametrize(("variant", "mesh"), CASES)
def test_a_mesh_equals_one_process(
    variant: str, mesh: str, tmp_path: Path, one_process: dict[str, tuple[list[float], dict[str, torch.Tensor]]]
) -> None:
    world_size, extra = MESHES[mesh]
    parameters = train_on(world_size, overrides(tmp_path, f"+variant={variant}", *EXTRA.get(variant, ()), *extra))
    expected_losses, expected = one_process[variant]
    loss_error = max(abs(a - b) / b for a, b in zip(losses(tmp_path / "run"), expected_losses, strict=True))
    parameter_error = max((parameters[name] - expected[name]).abs().max().item() for name in expected)
    report(
        "Meshes against one process, fp32, 5 steps",
        {
            "variant": variant,
            "mesh": mesh,
            "first loss": f"{expected_losses[0]:.4f}",
            "last loss": f"{expected_losses[-1]:.4f}",
            "rel. dloss": f"{loss_error:.1e}",
            "max |dparam|": f"{parameter_error:.1e}",
        },
    )
    assert expected_losses[-1] < expected_losses[0] - 0.01, "five steps must move the loss, or equality says nothing"
    assert loss_error < 1e-5
    assert parameter_error < 1e-4


def test_a_step_with_routed_experts_equals_one_process(tmp_path: Path) -> None:
    found = {}
    for run, ranks, extra in (("one", 1, ()), ("hsdp", 4, ("parallel.dp_replicate=2",))):
        arguments = overrides(tmp_path, "+variant=tiny_26b_a4b", "train.steps=1", *extra, run=run)
        found[run] = train_on(ranks, arguments)
    (one,), (hsdp,) = losses(tmp_path / "one"), losses(tmp_path / "hsdp")
    assert abs(one - hsdp) / one < 1e-6
    assert max((found["one"][name] - found["hsdp"][name]).abs().max().item() for name in found["one"]) < 1e-4


def test_bfloat16_compute_follows_float32(
    tmp_path: Path, one_process: dict[str, tuple[list[float], dict[str, torch.Tensor]]]
) -> None:
    train_on(2, overrides(tmp_path, "+variant=tiny_e4b", "run.dtype=bfloat16"))
    found = losses(tmp_path / "run")
    assert found != one_process["tiny_e4b"][0], "bfloat16 was asked for"
    assert max(abs(a - b) / b for a, b in zip(found, one_process["tiny_e4b"][0], strict=True)) < 1e-2
