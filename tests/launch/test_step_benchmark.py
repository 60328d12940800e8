"""The benchmark of a step: what it compares is the same computation, and what it counts is there."""

from __future__ import annotations

import pytest

from launch.benchmarks.shapes import SHAPES, batch
from launch.benchmarks.step import Options, measure, ours, transformers
from model import Gemma4Config

TINY = {
    name: config.replace(vocab_size=500, vocab_size_per_layer_input=500, num_hidden_layers=layers)
    for (name, config), layers in zip(SHAPES.items(), (15, 5, 2), strict=True)
}


@pytest.mark.parametrize(("share", "documents"), [(1.0, 1), (0.2, 1), (1.0, 5)])
@pytest.mark.parametrize("name", TINY)
def test_both_compute_the_same_loss_and_gradients(name: str, share: float, documents: int) -> None:
    config: Gemma4Config = TINY[name]
    found = []
    for build in (ours, transformers):
        model, step = build(config, batch(config, 64, share, documents))
        loss = step()
        table = next(p for key, p in model.named_parameters() if key.endswith("embed_tokens.weight"))
        assert table.grad is not None
        found.append((loss.item(), table.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    difference = (found[0][1] - found[1][1]).norm() / found[1][1].norm()
    assert difference < 1e-3, "in float32; equality to rounding is shown in float64 elsewhere"


def test_the_supervised_share_is_what_is_asked_for() -> None:
    for share in (1.0, 0.5, 0.2):
        tokens, keep, _ = batch(TINY["dense"], 101, share)
        assert keep.sum().item() == round(100 * share) and not keep[0, -1] and tokens.shape == (1, 101)
    packed = batch(TINY["dense"], 100, 1.0, documents=4)
    assert packed.is_packed and packed.documents.unique().tolist() == [1, 2, 3, 4] and packed.keep.sum() == 96


def test_rounds_are_counted_in_processes_of_their_own() -> None:
    (us,) = measure(("ours",), TINY["dense"], batch(TINY["dense"], 64, 1.0), rounds=2)
    assert len(us.rounds) == 2 and us.seconds > 0 and us.speed > 1e9
    assert us.rounds[0][1] == us.rounds[1][1], "steps begin from the same weights, without gradients"
    assert set(Options().shapes) == set(SHAPES)
