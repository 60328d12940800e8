"""Every mesh of every variant gives the numbers of one process: five float32 optimizer steps, every gradient.

Rows are packed documents with unsupervised spans and one row without any label. What passes here
is the support matrix of the README.
"""

from __future__ import annotations

import pytest

from parallel.layout import Layout
from tests.matrix import MESHES, cases, written
from tests.meshes import BOUNDS, Case, Errors, run
from tests.report import report


def hold(title: str, mesh: str, case: Case) -> Errors:
    found = run(case)
    report(
        title,
        {
            "mesh": mesh,
            "variant": case.variant,
            "options": ", ".join(f"{name}={value}" for name, value in case.options),
            "loss": f"{found.loss:.1e}",
            "gradient norm": f"{found.norm:.1e}",
            "worst gradient": f"{found.gradient:.1e}",
        },
    )
    return found


@pytest.mark.parametrize(
    ("mesh", "case"), cases(), ids=lambda value: value if isinstance(value, str) else value.variant
)
def test_a_mesh_equals_one_process(mesh: str, case: Case) -> None:
    found = hold("Meshes against one process, fp32, 5 steps, relative errors", mesh, case)
    assert found.loss < BOUNDS.loss and found.norm < BOUNDS.norm and found.gradient < BOUNDS.gradient, found


OPTIONS: dict[str, Case] = {
    "accumulation": Case("e4b", Layout(dp_shard=2), micro_batch_size=1),
    "reduced in every micro-batch": Case("e4b", Layout(dp_shard=2), micro_batch_size=1, gradient_sync="every"),
    "kept gathered": Case("e2b", Layout(dp_shard=2), (("reshard_after_forward", False),)),
    "cpu offload": Case("e4b", Layout(dp_shard=2, tp=2), (("cpu_offload", True),)),
    "recompute": Case("26b_a4b", Layout(dp_shard=2, tp=2, ep=4), (("activation_checkpoint", "full"),)),
    "recompute, cp": Case("e2b", Layout(cp=2, tp=2), (("activation_checkpoint", "full"),)),
    "recompute every 2nd": Case(
        "31b", Layout(tp=2), (("activation_checkpoint", "full"), ("activation_checkpoint_every", 2))
    ),
    "selective": Case("31b", Layout(cp=2, tp=2), (("activation_checkpoint", "selective"),)),
    "selective, ep": Case("26b_a4b", Layout(dp_shard=2, ep=2), (("activation_checkpoint", "selective"),)),
    "routed to 3 of 8 experts": Case("26b_a4b", Layout(dp_shard=2, tp=2, ep=4), steps=1),
    "routed, no sequence parallel": Case("26b_a4b", Layout(tp=2, cp=2, ep=4, sequence_parallel=False), steps=1),
    "a vocabulary that does not divide": Case("12b", Layout(tp=4), sizes=(("vocab_size", 203),)),
    "the same, sharded further": Case("31b", Layout(dp_shard=2, tp=2), sizes=(("vocab_size", 203),)),
    "fewer experts than ranks": Case("26b_a4b", Layout(dp_shard=4), sizes=(("num_experts", 2), ("top_k_experts", 2))),
    "interleaved pipeline": Case("e2b", Layout(pp=2, dp_shard=2), (("pp_schedule", "interleaved"),)),
    "zero-bubble pipeline": Case("31b", Layout(pp=2, tp=2), (("pp_schedule", "zero_bubble"),)),
    "pipeline with recompute": Case("26b_a4b", Layout(pp=2, dp_shard=2, ep=2), (("activation_checkpoint", "full"),)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_no_number(name: str) -> None:
    found = hold("Options on meshes against one process", name, OPTIONS[name])
    assert found.loss < BOUNDS.loss and found.norm < BOUNDS.norm and found.gradient < BOUNDS.gradient, found


def test_the_readme_shows_the_meshes_that_are_tested() -> None:
    assert written() == {mesh: set(kind.variants) for mesh, kind in MESHES.items()}
