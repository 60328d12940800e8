"""Logits and every gradient equal the reference's, for random configs of every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.harness.compare import hold, in_double, relative_error
from tests.harness.reference import (
    EXACT,
    FAMILIES,
    ours_from,
    ours_step,
    perturbed_reference,
    random_config,
    reference_in_double,
    reference_step,
    to_bfloat16,
)
from tests.harness.report import report

LENGTH = 40
BOUND = 1e-4


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_the_reference(family: str, seed: int) -> None:
    config = random_config(family, seed)
    reference = perturbed_reference(config, seed)
    ours = ours_from(reference, config)
    generator = torch.Generator().manual_seed(seed)
    length = LENGTH if seed else 5 * LENGTH  # several blocks of the attention kernel
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    labels = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    few = torch.full_like(labels, -100)
    few[0, 7], few[1, -3:] = labels[0, 7], labels[1, -3:]

    for kind, wanted in (("all", labels), ("few", few)):
        logits, grads = reference_step(reference, tokens, wanted)
        with reference_in_double(reference):
            exact_logits, exact_grads = reference_step(reference, tokens, wanted)
        with torch.no_grad():
            ours_logits = ours.logits(ours(tokens))
        with in_double(ours):
            doubled_grads = ours_step(ours, tokens, wanted)
            with torch.no_grad():
                doubled_logits = ours.logits(ours(tokens))
        exact = max(
            relative_error(doubled_logits, exact_logits),
            *(relative_error(doubled_grads[name], exact_grads[name]) for name in exact_grads),
        )
        logit_error = (ours_logits - logits).abs().max().item()
        logit_floor = (logits - exact_logits).abs().max().item()
        ours_grads = ours_step(ours, tokens, wanted)
        assert ours_grads.keys() == grads.keys() == dict(ours.named_parameters()).keys()
        errors = {name: relative_error(ours_grads[name], grads[name]) for name in grads}
        floors = {name: relative_error(grads[name], exact_grads[name]) for name in grads}
        worst = max(errors, key=lambda name: errors[name] / max(BOUND, 3 * floors[name]))
        report(
            "Equality with transformers, float64 and float32",
            {
                "family": family,
                "seed": seed,
                "supervised": kind,
                "length": length,
                "window": config.sliding_window,
                "float64": f"{exact:.1e}",
                "max |dlogit|": f"{logit_error:.1e}",
                "its fp32-fp64": f"{logit_floor:.1e}",
                "worst gradient": worst.removeprefix("language_model."),
                "rel. error": f"{errors[worst]:.1e}",
                "fp32-fp64": f"{floors[worst]:.1e}",
            },
        )
        hold("transformers, float64", exact, EXACT)
        hold("transformers, logits, float32", logit_error, max(BOUND, 3 * logit_floor))
        for name, error in errors.items():
            hold("transformers, gradients, float32", error, max(BOUND, 3 * floors[name]), name)
            assert grads[name].norm() > 0, name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "26b_a4b"])
def test_bfloat16_logits_equal_the_reference_bit_for_bit(family: str, seed: int) -> None:
    config = random_config(family, seed)
    ours = ours_from(perturbed_reference(config, seed), config).bfloat16()
    reference = to_bfloat16(perturbed_reference(config, seed))
    tokens = torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert torch.equal(ours.logits(ours(tokens)), reference(tokens, use_cache=False).logits)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_experts_are_nearer_the_truth_than_the_reference(seed: int) -> None:
    """The reference scores experts and adds up a token's in bfloat16, we both in float32."""
    config = random_config("26b_a4b", seed)
    exact = perturbed_reference(config, seed).model.layers[0]
    ours = ours_from(perturbed_reference(config, seed), config).bfloat16().layers[0]
    reference = to_bfloat16(perturbed_reference(config, seed)).model.layers[0]
    x = torch.randn(500, config.hidden_size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    with torch.no_grad():
        for part in ("router", "experts"):
            rounded = getattr(reference, part).parameters()
            for tensor, other in zip(getattr(exact, part).parameters(), rounded, strict=True):
                tensor.copy_(other)

        def by_expert(weights: Tensor, indices: Tensor) -> Tensor:
            return torch.zeros(len(x), config.num_experts or 0).scatter_(1, indices, weights.float())

        weights, indices = ours.router(x)
        routed, wanted = by_expert(weights, indices), by_expert(*exact.router(x.float())[1:])
        assert (routed - wanted).norm() < 0.1 * (by_expert(*reference.router(x)[1:]) - wanted).norm()
        truth = exact.experts(x.float(), indices, weights)
        found = (ours.experts(x, weights, indices, lambda: x)[0] - truth).norm()
        assert found < (reference.experts(x, indices, weights) - truth).norm()
        assert found / truth.norm() < 5e-3
