"""Every mesh of every variant gives the numbers of one process: a few optimizer steps, every gradient.

Rows are packed documents with unsupervised spans and one row without any label. What passes here is the support
matrix of the README. In float64 a mesh agrees to 1e-10 or differs by a mistake, on any processor; float32, in which
rounding is all that is left to differ, is tried on the meshes that use most plans.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from parallel.layout import Layout
from tests.harness.meshes import VARIANTS, Case, Errors, run_all
from tests.harness.report import report
from tests.matrix import MESHES, MOE, on_mesh, written


def hold(title: str, mesh: str, variant: str, dtype: torch.dtype, found: Errors) -> None:
    report(
        title,
        {
            "mesh": mesh,
            "variant": variant,
            "dtype": str(dtype).removeprefix("torch."),
            "loss": f"{found.loss:.1e}",
            "gradient norm": f"{found.norm:.1e}",
            "worst gradient": f"{found.gradient:.1e}",
            "bound": f"{found.bound:.1e}",
        },
    )
    found.hold(title.partition(" ")[0].lower(), dtype, mesh, variant)


QUICK = {v: ("ep2" if v in MOE else "dp2", "tp2+sp", "pp2·cp2") for v in VARIANTS}
"""Every kind of plan in three meshes; all others are marked `matrix`."""


@pytest.mark.parametrize(
    ("mesh", "variant"),
    [
        pytest.param(mesh, variant, marks=() if mesh in QUICK[variant] else pytest.mark.matrix)
        for mesh, kind in MESHES.items()
        for variant in kind.variants
    ],
)
def test_a_mesh_equals_one_process(mesh: str, variant: str) -> None:
    """Three steps, of which the last two need the state of the optimizer; `tests.matrix` takes five."""
    found = on_mesh(mesh, 3)[variant]
    hold("Meshes against one process, relative errors", mesh, variant, torch.float64, found)


@pytest.mark.matrix
@pytest.mark.parametrize("mesh", ["dp2·tp2+sp·cp2", "pp2·dp2·tp2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mesh_equals_one_process_in_float32(variant: str, mesh: str) -> None:
    found = on_mesh(mesh, 5, torch.float32)[variant]
    hold("Meshes against one process, relative errors", mesh, variant, torch.float32, found)


RECOMPUTED = (("activation_checkpoint.mode", "full"),)
OPTIONS: dict[str, Case] = {
    "accumulation": Case("e4b", Layout(dp_shard=2), micro_batch_size=1),
    "reduced in every micro-batch": Case("e4b", Layout(dp_shard=2), micro_batch_size=1, gradient_sync="every"),
    "kept gathered": Case("e2b", Layout(dp_shard=2), (("parallel.reshard_after_forward", False),)),
    "cpu offload": Case("e4b", Layout(dp_shard=2, tp=2), (("parallel.cpu_offload", True),)),
    "recompute": Case("26b_a4b", Layout(dp_shard=2, tp=2, ep=4), RECOMPUTED),
    "recompute, cp": Case("e2b", Layout(cp=2, tp=2), RECOMPUTED),
    "recompute every 2nd": Case(
        "31b", Layout(tp=2), (("activation_checkpoint.mode", "full"), ("activation_checkpoint.every", 2))
    ),
    "selective": Case("31b", Layout(cp=2, tp=2), (("activation_checkpoint.mode", "selective"),)),
    "selective, ep": Case("26b_a4b", Layout(dp_shard=2, ep=2), (("activation_checkpoint.mode", "selective"),)),
    "routed, no sequence parallel": Case("26b_a4b", Layout(tp=2, cp=2, ep=4, sequence_parallel=False)),
    "routed to 3 of 8 experts in float32": Case(
        "26b_a4b", Layout(dp_shard=2, tp=2, ep=4), steps=1, dtype=torch.float32
    ),
    "a vocabulary that does not divide": Case("12b", Layout(tp=4), sizes=(("vocab_size", 203),)),
    "the same, sharded further": Case("31b", Layout(dp_shard=2, tp=2), sizes=(("vocab_size", 203),)),
    "fewer experts than ranks": Case("26b_a4b", Layout(dp_shard=4), sizes=(("num_experts", 3), ("top_k_experts", 2))),
    "interleaved pipeline": Case("e2b", Layout(pp=2, dp_shard=2), (("parallel.pp_schedule", "interleaved"),)),
    "zero-bubble pipeline": Case("31b", Layout(pp=2, tp=2), (("parallel.pp_schedule", "zero_bubble"),)),
    "pipeline with recompute": Case("26b_a4b", Layout(pp=2, dp_shard=2, ep=2), RECOMPUTED),
}


@cache
def on_ranks(ranks: int) -> dict[str, Errors]:
    named = {
        name: replace(case, steps=min(case.steps, 3))
        for name, case in OPTIONS.items()
        if case.layout.world_size == ranks
    }
    return dict(zip(named, run_all(list(named.values())), strict=True))


@pytest.mark.matrix
@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_no_number(name: str) -> None:
    case = OPTIONS[name]
    found = on_ranks(case.layout.world_size)[name]
    hold("Options on meshes against one process, relative errors", name, case.variant, case.dtype, found)


def test_the_readme_shows_the_meshes_that_are_tested() -> None:
    assert written() == {mesh: set(kind.variants) for mesh, kind in MESHES.items()}
