"""A checkpoint that `transformers` wrote, loaded by us: logits and every gradient, encoders included, are its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import Gemma4
from model.head import linear_cross_entropy
from model.hf.hub import load_model
from model.media import Media
from tests.harness.compare import hold, in_double, largest, relative_error
from tests.harness.multimodal import (
    Example,
    disk_names,
    make_example,
    random_whole_config,
    save_reference,
    whole_reference,
)
from tests.harness.reference import (
    EXACT,
    FAMILIES,
    reference_in_double,
)
from tests.harness.report import report

BOUND = 1e-4
CASES: dict[str, list[list[Any]]] = {
    "text": [[30], [22]],
    "image": [[7, ("image", 3, 2), 12], [4, ("image", 1, 2), 9]],
    "two images": [[5, ("image", 2, 2), ("image", 1, 3), 8], [20]],
    "video": [[6, ("video", [(2, 2), (2, 2), (2, 2)]), 10], [9, ("video", [(1, 4)]), 5]],
    "audio": [[5, ("audio", 37), 12], [3, ("audio", 64), 2, ("audio", 5), 6]],
    "all": [[3, ("image", 3, 2), 4, ("video", [(2, 1), (2, 1)]), 9, ("image", 1, 1), 2], [20, ("audio", 90), 4]],
}


def reference_gradients(reference: Any, example: Example, names: dict[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients under our names of the mean cross entropy over labels."""
    reference.zero_grad()
    inputs = {k: v.to(reference.dtype) if v.is_floating_point() else v for k, v in example.reference.items()}
    if reference.config.model_type == "gemma4_unified":
        # This class's own forward lays the two-way mask of images over full layers too; its generation, and
        # every other Gemma 4 class, over sliding layers alone. So it is given the masks of its generation.
        inputs["attention_mask"] = reference.create_masks_for_generate(
            reference.config,
            torch.zeros(*example.tokens_BS.shape, 1, dtype=reference.dtype),
            None,
            None,
            None,
            mm_token_type_ids=example.reference["mm_token_type_ids"],
        )
    logits = reference(input_ids=example.tokens_BS, use_cache=False, **inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), example.labels_BS.flatten())
    loss.backward()
    return logits.detach(), {names[n]: p.grad for n, p in reference.named_parameters() if p.grad is not None}


def our_gradients(
    model: Gemma4, example: Example, document_ids: Tensor | None = None, positions: Tensor | None = None
) -> dict[str, Tensor]:
    model.zero_grad()
    keep = example.labels_BS != -100
    hidden = model(example.tokens_BS, positions, document_ids, keep, media=example.media)
    loss = linear_cross_entropy(
        hidden, model.head_weight, example.labels_BS[keep], softcap=model.config.final_logit_softcapping
    )
    (loss.total / keep.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=[(family, seed) for family in FAMILIES for seed in (0, 1)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Gemma4, Any]:
    family, seed = request.param
    config = random_whole_config(family, seed)
    reference = whole_reference(config, seed)
    folder: Path = tmp_path_factory.mktemp(f"{family}_{seed}")
    save_reference(reference, folder)
    model = load_model(folder)
    assert model.config == config
    return family, model, reference


Result = tuple[Tensor, dict[str, Tensor]]
"""Logits and gradients."""


def compare(family: str, case: str, ours: Gemma4, reference: Any, found: Callable[[], Result], wanted: Any) -> None:
    """Equal in float64; in float32 within the bound, or within three times the reference's own rounding."""
    (logits, grads), (wanted_logits, wanted_grads) = found(), wanted()
    with reference_in_double(reference):
        exact_logits, exact_grads = wanted()
    with in_double(ours):
        doubled_logits, doubled_grads = found()
    exact = {name: relative_error(doubled_grads[name], exact_grads[name]) for name in exact_grads}
    exact["logits"] = relative_error(doubled_logits, exact_logits)
    error, floor = ((a - wanted_logits).abs().max().item() for a in (logits, exact_logits))
    errors = {name: relative_error(grads[name], wanted_grads[name]) for name in wanted_grads}
    floors = {name: relative_error(wanted_grads[name], exact_grads[name]) for name in wanted_grads}
    worst = max(errors, key=lambda name: errors[name] / max(BOUND, 3 * floors[name]))
    report(
        "Equality with transformers, encoders included, float64 and float32",
        {
            "family": family,
            "case": case,
            "float64": f"{max(exact.values()):.1e}",
            "max |dlogit|": f"{error:.1e}",
            "its fp32-fp64": f"{floor:.1e}",
            "gradients": len(grads),
            "worst gradient": worst,
            "rel. error": f"{errors[worst]:.1e}",
            "fp32-fp64": f"{floors[worst]:.1e}",
        },
    )
    assert grads.keys() == wanted_grads.keys()
    exact_error, where = largest(exact)
    hold("transformers with encoders, float64", exact_error, EXACT, where)
    hold("transformers with encoders, logits, float32", error, max(BOUND, 3 * floor))
    for name in grads:
        hold("transformers with encoders, gradients, float32", errors[name], max(BOUND, 3 * floors[name]), name)
        assert wanted_grads[name].norm() > 0, name


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_reference(pair: tuple[str, Gemma4, Any], case: str) -> None:
    family, ours, reference = pair
    rows = CASES[case]
    if ours.config.audio is None:
        if case == "audio":
            pytest.skip("the released model of this size has no audio encoder")
        rows = [[piece for piece in row if isinstance(piece, int) or piece[0] != "audio"] for row in rows]
    example = make_example(ours.config, rows, seed=len(case))
    names = disk_names(reference)

    def found() -> Result:
        with torch.no_grad():
            logits = ours.logits(ours(example.tokens_BS, media=example.media))
        grads = our_gradients(ours, example)
        assert any(not name.startswith("language_model.") for name in grads) == (case != "text")
        return logits, grads

    compare(family, case, ours, reference, found, lambda: reference_gradients(reference, example, names))


def test_packed_documents_with_images_equal_the_reference_one_by_one(pair: tuple[str, Gemma4, Any]) -> None:
    """Three documents in one row, an image at the very start of one and the very end of another."""
    family, ours, reference = pair
    pieces: tuple[list[Any], ...] = ([4, ("image", 2, 3)], [("image", 1, 2), 7, ("image", 2, 1), 3], [11])
    documents = [make_example(ours.config, [p], seed=i) for i, p in enumerate(pieces)]
    names = disk_names(reference)

    def one_by_one() -> Result:
        steps = [reference_gradients(reference, d, names) for d in documents]
        counts = [int((d.labels_BS != -100).sum()) for d in documents]
        summed: dict[str, Tensor] = {}
        for (_, grads), count in zip(steps, counts, strict=True):
            for name, grad in grads.items():
                summed[name] = summed.get(name, 0) + grad * (count / sum(counts))
        return torch.cat([logits for logits, _ in steps], dim=1), summed

    tokens, labels = (torch.cat([getattr(d, n) for d in documents], dim=1) for n in ("tokens_BS", "labels_BS"))
    lengths = torch.tensor([d.tokens_BS.shape[1] for d in documents])
    document_ids = torch.arange(3).repeat_interleave(lengths)[None]
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    media = Media.build(ours.config, tokens, [image for d in documents for image in d.images])
    packed = Example(tokens, labels, media, {}, [], [])

    def together() -> Result:
        with torch.no_grad():
            logits = ours.logits(ours(tokens, positions, document_ids, media=media))
        return logits, our_gradients(ours, packed, document_ids, positions)

    compare(family, "packed", ours, reference, together, one_by_one)
