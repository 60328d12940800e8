"""Packed documents, skipped work and recomputation change nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model.masks import attention_mask
from tests.harness.compare import hold, relative_error
from tests.harness.reference import (
    EXACT,
    FAMILIES,
    ours_from,
    ours_step,
    perturbed_reference,
    random_config,
    reference_in_double,
    reference_step,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_on_their_own(family: str) -> None:
    config = random_config(family, 1)
    reference = perturbed_reference(config, 1)
    ours = ours_from(reference, config).double()
    pieces = [torch.randint(3, config.vocab_size, (1, n)) for n in (19, 1, 30)]
    tokens = torch.cat(pieces, dim=1)
    ids = torch.cat([torch.full_like(p, i) for i, p in enumerate(pieces)], dim=1)
    positions = torch.cat([torch.arange(p.shape[1])[None] for p in pieces], dim=1)
    with torch.no_grad():
        together = ours.logits(ours(tokens, positions, ids))
        with reference_in_double(reference):
            apart = torch.cat([reference(p, use_cache=False).logits for p in pieces], dim=1)
    hold("documents packed and alone, float64", relative_error(together, apart), EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_unsupervised_work_changes_no_gradient(family: str) -> None:
    config = random_config(family, 2)
    ours = ours_from(perturbed_reference(config, 2), config).double()
    tokens = torch.randint(0, config.vocab_size, (2, 150))
    labels = torch.full_like(tokens, -100)
    labels[0, -4:], labels[1, 60:75] = 5, 9
    ids = (torch.arange(150) // 70).expand(2, 150)
    skipped = ours_step(ours, tokens, labels, ids)
    whole = ours_step(ours, tokens, labels, ids, skip=False)
    assert skipped.keys() == whole.keys()
    for name in whole:
        assert whole[name].norm() > 0, name
        hold("work skipped and done, float64", relative_error(skipped[name], whole[name]), EXACT, name)


def test_consumer_layers_and_the_last_layer_see_supervised_rows_only() -> None:
    config = random_config("e4b", 0)
    ours = ours_from(perturbed_reference(config, 0), config)
    rows: dict[int, int] = {}
    for index, layer in enumerate(ours.layers):
        layer.mlp.register_forward_hook(lambda m, args, out, index=index: rows.__setitem__(index, args[0].shape[0]))
    supervised = torch.zeros(2, 40, dtype=torch.bool)
    supervised[1, -3:] = True
    assert ours(torch.ones(2, 40, dtype=torch.long), supervised=supervised).shape == (3, config.hidden_size)
    first = config.first_kv_shared_layer - 1
    assert rows == {i: 3 if i >= first else 80 for i in range(config.num_hidden_layers)}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", ["e2b", "e4b"])
def test_gradients_of_shared_keys_and_values_survive_recomputation(family: str, skip: bool) -> None:
    config = random_config(family, 3)
    reference = perturbed_reference(config, 3)
    ours = ours_from(reference, config).double()
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    labels = torch.full_like(tokens, -100)
    labels[:, -6:] = torch.randint(0, config.vocab_size, (2, 6))
    with reference_in_double(reference):
        _, expected = reference_step(reference, tokens, labels)
    for layer in ours.layers:
        again = partial(checkpoint, layer.forward, use_reentrant=False)
        layer.forward = again  # type: ignore[method-assign]
    found = ours_step(ours, tokens, labels, skip=skip)
    producers = {config.layer(i).kv_source for i in range(config.first_kv_shared_layer, config.num_hidden_layers)}
    assert producers
    for name in expected:
        hold("shared keys recomputed, float64", relative_error(found[name], expected[name]), EXACT, name)
    for producer in producers:
        assert expected[f"language_model.layers.{producer}.self_attn.k_proj.weight"].norm() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_supervised_position_gives_no_output_and_zero_gradients(family: str) -> None:
    config = random_config(family, 4)
    ours = ours_from(perturbed_reference(config, 4), config)
    tokens = torch.ones(1, 12, dtype=torch.long)
    hidden = ours(tokens, supervised=torch.zeros(1, 12, dtype=torch.bool))
    assert hidden.shape == (0, config.hidden_size)
    hidden.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_a_mask_of_no_queries_has_no_blocks() -> None:
    assert attention_mask(2, 10).select(torch.empty(0, dtype=torch.long)).blocks == ()
