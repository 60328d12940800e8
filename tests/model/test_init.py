"""Initial values: their distribution, and that any slice can be drawn on its own."""

from __future__ import annotations

from math import inf

import pytest
import torch

from model import Gemma4, Gemma4Config
from model.init import (
    init_slice_,
    initialised_tensors,
    random_fill,
    reference_vector,
    stable_vector,
    whole_slices,
)
from model.variants import VARIANT_NAMES


@pytest.mark.parametrize("name", [name for name in VARIANT_NAMES if "tiny" in name])
def test_initial_values_follow_the_reference(name: str) -> None:
    model = Gemma4(Gemma4Config.from_name(name))
    with torch.no_grad():
        for _, tensor in initialised_tensors(model):
            tensor.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(7))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith(("bias", "per_dim_scale")) else 1)).all(), name
        else:
            spread = 5 * parameter.numel() ** -0.5
            assert abs(parameter.std().item() / 0.02 - 1) < spread, name
            assert abs(parameter.mean().item() / 0.02) < spread, name
    for name, buffer in model.named_buffers():
        bounds = {"input_min": -inf, "output_min": -inf, "input_max": inf, "output_max": inf, "std_bias": 0.0}
        assert (buffer == bounds.get(name.rpartition(".")[2], 1.0)).all(), name
    assert not model.get_parameter("language_model.embed_tokens.weight")[0].any()
    assert model.layers[0].layer_scalar.item() == 1


def test_the_seed_alone_decides_and_names_differ() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = Gemma4(Gemma4Config.from_name("gemma4_tiny_31b"))
        model.init_weights(torch.Generator().manual_seed(seed))
        return dict(model.named_parameters())

    a, b, c = weights(1), weights(1), weights(2)
    q = "language_model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a[q], c[q])
    assert not torch.equal(a[q], a[q.replace("layers.0", "layers.1")])


def test_a_slice_equals_the_same_part_of_the_whole() -> None:
    shape = torch.Size((3000, 700))  # more than one block of rows
    whole = torch.empty(shape)
    init_slice_(whole, "x.weight", shape, (0, 0), seed=3, std=0.02, padding_row=0)
    for rows, columns in (((0, 10), (0, 700)), ((1490, 1510), (100, 300)), ((2999, 3000), (699, 700))):
        part = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
        init_slice_(part, "x.weight", shape, (rows[0], columns[0]), seed=3, std=0.02, padding_row=0)
        assert torch.equal(part, whole[slice(*rows), slice(*columns)])


def test_the_stable_start_makes_scores_of_size_one_and_blocks_that_do_not_add_up_with_depth() -> None:
    config = Gemma4Config.from_name("tiny_31b", vision=None, audio=None)
    tokens_BS = torch.randint(3, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    grown: list[float] = []
    scores: list[float] = []
    for start in (reference_vector, stable_vector(config.num_hidden_layers)):
        model = Gemma4(config)
        random_fill(7, config.initializer_range, config.pad_token_id, start)(whole_slices(model))
        model.layers[-1].register_forward_hook(lambda m, given, out: grown.append(out[0].square().mean().sqrt().item()))
        with torch.no_grad():
            model(tokens_BS)
        scores.append(
            model.layers[0].get_parameter("self_attn.q_norm.weight").detach().norm().item()
        )  # of scores with random keys
    assert grown == [pytest.approx((2 * config.num_hidden_layers) ** 0.5, rel=0.1), pytest.approx(1, rel=0.1)]
    assert scores == [pytest.approx(config.head_dim**0.5), pytest.approx(1.0)]


def test_the_stable_start_changes_norms_of_decoder_layers_only() -> None:
    config = Gemma4Config.from_name("tiny_26b_a4b")
    changed = set()
    for name, tensor in initialised_tensors(Gemma4(config)):
        if tensor.dim() == 1 and stable_vector(18)(name, tensor.shape) != reference_vector(name, tensor.shape):
            assert name.startswith("language_model.layers.")
            changed.add(name.split(".", 3)[3])
    assert changed == {
        "self_attn.q_norm.weight",
        "post_attention_layernorm.weight",
        "post_feedforward_layernorm.weight",
    }
    assert stable_vector(18)("language_model.layers.3.post_attention_layernorm.weight", torch.Size((8,))) == 1 / 6
