"""Decoding with a cache equals decoding without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import Gemma4
from model.generate import GREEDY, Cache, Sampling, cache_masks, generate, sample
from model.inputs import make_inputs
from tests.harness.multimodal import make_example, random_whole_config, whole_ours, whole_reference
from tests.harness.reference import (
    FAMILIES,
    ours_from,
    perturbed_reference,
    random_config,
    reference_in_double,
)


def uncached(model: Gemma4, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_cache_equals_greedy_without(family: str, seed: int) -> None:
    config = random_config(family, seed)
    # Two scores may be nearer than float32 tells apart, and then rounding chooses the text.
    model = ours_from(perturbed_reference(config, seed), config).double()
    prompts = [[2, 5, 9, 11, 3, 8, 40], [2, 17], [2, *list(range(20, 45))]]
    found = generate(model, prompts, 24, sampling=GREEDY)
    assert found == [uncached(model, prompt, 24) for prompt in prompts]
    assert len({tuple(row) for row in found}) > 1


def test_a_sliding_layer_keeps_one_window_and_consumers_keep_nothing() -> None:
    config = random_config("e4b", 1)
    model = ours_from(perturbed_reference(config, 1), config)
    cache = Cache(config, batch_size=1)
    for position in range(32):
        masks = cache_masks(config, position, 1, torch.zeros(1, dtype=torch.long))
        with torch.no_grad():
            model.run(make_inputs(config, torch.tensor([[7]]), torch.tensor([[position]]), masks=masks), cache)
    assert set(cache.layers) == set(range(config.first_kv_shared_layer))
    for index, (k, _) in cache.layers.items():
        window = config.layer(index).window
        assert k.shape[1] == (32 if window is None else min(32, window - 1))


def test_generation_stops_at_the_stop_token() -> None:
    config = random_config("31b", 0)
    model = ours_from(perturbed_reference(config, 0), config)
    free = generate(model, [[2, 5, 6]], 12, sampling=GREEDY)[0]
    stopped = generate(model, [[2, 5, 6]], 12, sampling=GREEDY, stop=[free[3]])[0]
    assert stopped == free[: free.index(free[3]) + 1]


def test_sampling_stays_in_the_top_k_and_top_p() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, Sampling(1.0, 3, 1.0, generator))
    frequency = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = torch.tensor([4.0, 3.0, 2.0]).softmax(0)
    assert (frequency[:3] - expected).abs().max() < 0.03 and frequency[3:].sum() == 0
    assert set(sample(logits, Sampling(1.0, 5, 0.7, generator)).tolist()) == {0, 1}
    assert set(sample(logits, Sampling(0.0, 5, 1.0, generator)).tolist()) == {0}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_after_media_equals_the_reference(family: str) -> None:
    """Images (and sound where the variant hears it) in a prompt longer than the window; two prompts, padded."""
    config = random_whole_config(family, 0)
    reference = whole_reference(config, 0)
    model = whole_ours(reference, config).double()
    rows: list[list[Any]] = [[6, ("image", 2, 3), 3, ("image", 1, 2), 4], [9]]
    if config.audio is not None:
        rows[1] += [("audio", 20), 3]
    alone = [make_example(config, [row], seed=i) for i, row in enumerate(rows)]
    expected = []
    for example in alone:
        prompt = example.tokens_BS
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in example.reference.items()}
        with torch.no_grad(), reference_in_double(reference):
            out = reference.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, **inputs)
        expected.append(out[0, prompt.shape[1] :].tolist())
    prompts = [example.tokens_BS[0].tolist() for example in alone]
    images, clips = ([item for example in alone for item in getattr(example, kind)] for kind in ("images", "clips"))
    assert generate(model, prompts, 12, sampling=GREEDY, images=images, clips=clips) == expected
