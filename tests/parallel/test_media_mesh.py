"""Media that only some ranks have: the same gradients as one process, and nobody waits for anybody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch import Batch
from model import Gemma4
from model.init import random_fill, whole_slices
from model.media import Media
from parallel.apply import build_parallel_model
from parallel.fsdp import require_gradient_sync
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.world import World
from tests.harness.compare import hold, relative_error
from tests.harness.distributed import run_ranks
from tests.harness.media_batches import ROWS, batches, config_of
from tests.harness.meshes import Case, gradient_errors, plans, share_of, whole_gradients
from tests.harness.report import report
from train.engine import Engine, media_of_all_ranks
from train.objective import CrossEntropy, cross_entropy

CPU = torch.device("cpu")
VARIANTS = ("gemma4_tiny_e2b", "gemma4_tiny_e4b", "gemma4_tiny_12b", "gemma4_tiny_26b_a4b", "gemma4_tiny_31b")
MEDIA = (
    "vision",
    "audio",
    *(f"{kind}_token_id" for kind in ("boi", "boa", "image", "audio", "eoi", "eoa", "video")),
    "vocab_size",
    "vocab_size_per_layer_input",
)


def present(batch: Batch) -> tuple[bool, bool]:
    media = batch.inputs.media or Media()
    return media.vision is not None, media.audio is not None


def needed(batches: list[Batch]) -> tuple[bool, bool]:
    """Whether any of them has images, and whether any has sound."""
    vision, audio = zip(*map(present, batches), strict=True)
    return any(vision), any(audio)


def backward(model: Gemma4, batch: Batch, others: list[Batch]) -> Tensor:
    """Backward like the trainer's: every rank runs the encoders that any rank needs in this micro-batch."""
    vision, audio = needed([batch, *others])
    media = media_of_all_ranks(batch.inputs.media, model.config, vision=vision, audio=audio)
    loss = cross_entropy(model, replace(batch, inputs=replace(batch.inputs, media=media)))
    loss.total.backward()
    return loss.nll


@pytest.mark.parametrize(
    ("name", "ranks", "frozen", "options"),
    [
        *((name, 2, (), {}) for name in VARIANTS),
        ("gemma4_tiny_e4b", 3, (), {"activation_checkpoint.mode": "full"}),
        ("gemma4_tiny_e4b", 2, (), {"sync": "every"}),
        ("gemma4_tiny_e4b", 2, (), {"parallel.cpu_offload": True}),
        ("gemma4_tiny_e4b", 2, (), {"compute_dtype": torch.bfloat16}),
        ("gemma4_tiny_e4b", 2, ("vision_tower", "audio_tower", "embed_audio"), {}),
        ("gemma4_tiny_12b", 3, ("vision_embedder",), {}),
        ("gemma4_tiny_31b", 2, ("vision_tower", "embed_vision"), {"activation_checkpoint.mode": "full"}),
    ],
    ids=str,
)
def test_media_on_some_ranks_give_the_gradients_of_one_process(
    name: str, ranks: int, frozen: tuple[str, ...], options: dict[str, Any]
) -> None:
    config = config_of(name)
    options = dict(options)
    sync = options.pop("sync", "last")
    data = batches(config, ROWS)

    def run(world: World) -> tuple[float, dict[str, Tensor]]:
        fill = random_fill(3, 0.2, 0)
        mesh = build_mesh(CPU, Layout(dp_shard=world.size))
        wanted = plans({key: value for key, value in options.items() if key != "compute_dtype"})
        dtype = options.get("compute_dtype", torch.float64)
        model = build_parallel_model(config, mesh, CPU, fill, wanted, frozen=frozen, compute_dtype=dtype).model
        assert isinstance(model, Gemma4)
        total = torch.zeros((), dtype=torch.float64)
        accumulation = len(data) // world.size
        for step in range(accumulation):
            require_gradient_sync(model, sync == "every" or step == accumulation - 1)
            mine = data[step * world.size : (step + 1) * world.size]
            total += backward(model, mine[world.rank], mine).detach()
        torch.distributed.all_reduce(total)
        return float(total), whole_gradients(model)

    (alone, expected), *_ = run_ranks(1, run)
    for found_loss, found in run_ranks(ranks, run):
        assert found.keys() == expected.keys()
        worst = max(relative_error(found[name], expected[name]) for name in found)
        exact = "compute_dtype" not in options  # bfloat16 is one rounding of the same batches on any rank
        assert abs(found_loss / alone - 1) < (1e-12 if exact else 1e-6)
        hold(f"media on some ranks, {'float64' if exact else 'bfloat16'}", worst, 1e-10 if exact else 1e-4)
    trained = {name.partition(".")[0] for name in expected}
    encoders = {"vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio"}
    with torch.device("meta"):
        exist = {n for n, _ in Gemma4(config).named_children()}
    assert trained == (exist & (encoders | {"language_model"})) - set(frozen)
    report(
        "Media on some ranks against one process",
        {
            "variant": name.removeprefix("gemma4_"),
            "ranks": ranks,
            "frozen": ", ".join(frozen) or "none",
            "options": ", ".join(f"{k}={v}" for k, v in {"sync": sync, **options}.items()),
            "rel. dloss": f"{abs(found_loss / alone - 1):.1e}",
            "worst gradient": f"{worst:.1e}",
        },
    )


def test_a_batch_of_text_touches_no_encoder() -> None:
    config = config_of("gemma4_tiny_e4b")
    data = batches(config, [[30], [28]])

    def run(world: World) -> set[str]:
        mesh = build_mesh(CPU, Layout(dp_shard=world.size))
        model = build_parallel_model(config, mesh, CPU, random_fill(3, 0.2, 0)).model
        assert isinstance(model, Gemma4)
        backward(model, data[world.rank], data)
        return {name.partition(".")[0] for name in whole_gradients(model)}

    assert run_ranks(2, run) == [{"language_model"}] * 2


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("gemma4_tiny_e4b", Layout(tp=2), {}),
        ("gemma4_tiny_e4b", Layout(cp=2), {"activation_checkpoint.mode": "full"}),
        ("gemma4_tiny_e2b", Layout(pp=2, dp_shard=2), {}),
        ("gemma4_tiny_12b", Layout(cp=2, tp=2), {}),
        ("gemma4_tiny_31b", Layout(dp_shard=2, tp=2, sequence_parallel=False), {}),
    ],
    ids=str,
)
def test_media_on_any_mesh_give_the_gradients_of_one_process(
    name: str, layout: Layout, options: dict[str, Any]
) -> None:
    config = config_of(name)
    data = batches(config, [ROWS[0], ROWS[2], ROWS[1], ROWS[4]])
    supervised = sum(batch.kept.count for batch in data)

    def run(world: World, layout: Layout) -> dict[str, float]:
        mesh, fill = build_mesh(CPU, layout), random_fill(3, 0.1, 0)
        about: dict[str, Any] = {"sequence_length": 48, "compute_dtype": torch.float64}
        parallel = build_parallel_model(config, mesh, CPU, fill, plans(options), **about)
        mine = data[layout.data_rank(world.rank) :: layout.dp]
        flags = [needed(data[step : step + layout.dp]) for step in range(0, len(data), layout.dp)]
        Engine(parallel, CrossEntropy(), CPU).forward_backward(mine, supervised, flags)
        return gradient_errors(parallel.model, expected)

    plain = Gemma4(config).double()
    random_fill(3, 0.1, 0)(whole_slices(plain))
    for batch in data:
        (cross_entropy(plain, batch).total / supervised).backward()
    expected = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    found = run_ranks(layout.world_size, lambda world: run(world, layout))[0]
    worst = max(found, key=lambda key: found[key])
    report("Media on meshes", {"variant": name[7:], "mesh": layout, "worst": worst, "error": f"{found[worst]:.1e}"})
    hold("media on meshes, float64", found[worst], 1e-10, worst)


def test_a_pipeline_whose_towers_see_nothing_goes_on() -> None:
    """Text alone: the encoders of the first stage are never run."""
    case = Case("e2b", Layout(pp=2, dp_shard=2), sizes=tuple((name, getattr(config_of("e2b"), name)) for name in MEDIA))

    def on_rank(world: World) -> float:
        mesh = build_mesh(CPU, case.layout)
        parallel = build_parallel_model(case.config, mesh, CPU, random_fill(0, 0.1, 0), sequence_length=32)
        engine, total = Engine(parallel, CrossEntropy(), CPU), 0.0
        for step in range(2):
            engine.forward_backward(share_of(case, step, case.layout, world.rank), 100)
            total = engine.clip(1.0)
        return total

    assert all(norm > 0 for norm in run_ranks(4, on_rank))


@pytest.mark.parametrize("name", ["gemma4_tiny_e4b", "gemma4_tiny_12b", "gemma4_tiny_31b"])
def test_images_may_come_after_text_in_bfloat16(name: str) -> None:
    """One step's micro-batches, gradients kept until the last; their order changes nothing but rounding."""
    config = config_of(name)
    data = batches(config, [ROWS[1], ROWS[0]])

    def run(order: list[Batch]) -> dict[str, Tensor]:
        mesh, fill = build_mesh(CPU, Layout()), random_fill(3, 0.02, 0)
        parallel = build_parallel_model(config, mesh, CPU, fill, compute_dtype=torch.bfloat16)
        engine = Engine(parallel, CrossEntropy(), CPU)
        engine.forward_backward(order, 50)
        return whole_gradients(parallel.model)

    (text_first, images_first), *_ = run_ranks(1, lambda world: (run(data), run(data[::-1])))
    assert text_first.keys() == images_first.keys()
    for key, grad in text_first.items():
        assert torch.isfinite(grad).all() and relative_error(images_first[key], grad) < 1e-5, key
