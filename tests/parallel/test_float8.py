"""float8: the numbers of torchao's own conversion, in the decoder's linear layers and experts only, on every mesh.

A small model that was never trained is a poor ruler: queries and keys of norm 1 an element make its attention so
sharp that weights moved by 3 % turn the gradient about as far as float8 does, and bfloat16 turns it too. So how close
float8 comes is measured on models that were trained for a few steps, and for each product by itself; the others here
have query norms as small as usual scores.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import torchao.float8
import torchtitan.distributed.activation_checkpoint  # noqa: F401  slow; once here, not in every rank
from torch import Tensor, nn

from model import ConfigError, Gemma4, Gemma4Config
from model.init import Slice, random_fill, whole_slices
from model.linear import Linear
from model.moe import Experts
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.apply import build_parallel_model
from parallel.float8 import apply_float8, float8_grouped_mm, float8_product, rounded
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.options import ActivationCheckpointConfig, Float8Config
from parallel.world import World
from tests.harness.compare import hold
from tests.harness.distributed import run_ranks
from tests.harness.meshes import CPU, VARIANTS, plans, whole_gradients
from tests.harness.report import report

RECIPES = ("tensorwise", "rowwise")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "sliding_window_pattern": 2,
    "sliding_window": 8,
    "boi_token_id": 58,
    "boa_token_id": 59,
    "image_token_id": 60,
    "audio_token_id": 61,
    "eoi_token_id": 62,
    "eoa_token_id": 63,
    "video_token_id": 57,
}


def config_of(variant: str, **changed: Any) -> Gemma4Config:
    """Small, without towers. All experts take every token, so that rounding swaps none of them."""
    shared = {"num_kv_shared_layers": 2} if variant in ("e2b", "e4b") else {}
    experts = {"num_experts": 4, "top_k_experts": 4, "moe_intermediate_size": 32} if variant == "26b_a4b" else {}
    return Gemma4Config.from_name(
        f"tiny_{variant}", **(SIZES | {"vision": None, "audio": None} | shared | experts | changed)
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and which are supervised, whose number is no multiple of 16 nor the same in both halves."""
    tokens = torch.randint(3, 57, (4, 20), generator=torch.Generator().manual_seed(1))
    supervised = torch.rand(4, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    return tokens, tokens.roll(-1, 1), supervised


def backward(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    """The part of the loss per token of the whole batch that these rows make."""
    assert isinstance(model, Gemma4)
    tokens, labels, supervised = batch()
    hidden = model(tokens[rows], supervised=supervised[rows])
    loss = model.head(hidden, model.head_weight, labels[rows][supervised[rows]]).total / supervised.sum()
    loss.backward()
    return loss.detach()


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@torch.no_grad()
def fill(slices: list[Slice]) -> None:
    random_fill(0, 0.1, 0)(slices)
    for part in slices:
        if part.name.endswith("q_norm.weight"):
            part.local.fill_(0.1)


def build(variant: str, dtype: torch.dtype = torch.float32) -> Gemma4:
    model = Gemma4(config_of(variant))
    fill(whole_slices(model))
    return model.to(dtype)


@cache
def trained(variant: str, recipe: str, dtype: torch.dtype, checkpoint: str = "none") -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a model without other plans."""
    model = build(variant, dtype)
    apply_float8(model, Float8Config(recipe))
    apply_activation_checkpoint(model, ActivationCheckpointConfig(mode=checkpoint))
    return float(backward(model)), whole_gradients(model)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_close_to_those_without_it(variant: str, recipe: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        (expected, wanted), (loss, found) = (trained(variant, name, dtype) for name in ("none", recipe))
        assert found.keys() == wanted.keys()
        alike = cosine(flat(found), flat(wanted))
        report(
            "Gradients in float8 against those without",
            {"variant": variant, "recipe": recipe, "dtype": dtype, "cosine": f"{alike:.4f}"},
        )
        assert loss == pytest.approx(expected, rel=2e-2) and loss != expected
        hold("float8 without training, 1 - cosine", 1 - alike, 0.1)
        assert alike < 0.999  # it rounds: nearer, and part of the products would have been left alone


def next_tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Sequences in which a token mostly follows from the one before, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens_SB = [torch.randint(3, 57, (16,), generator=generator)]
    for _ in range(32):
        random = torch.randint(3, 57, (16,), generator=generator)
        follows = torch.rand(16, generator=generator) < 0.8
        tokens_SB.append(torch.where(follows, tokens_SB[-1] * 5 % 54 + 3, random))
    tokens_BS = torch.stack(tokens_SB, dim=1)
    return tokens_BS[:, :-1], tokens_BS[:, 1:]


def learn(model: Gemma4, seed: int) -> float:
    tokens, labels = next_tokens(seed)
    loss = model.head(model(tokens).flatten(0, 1), model.head_weight, labels.flatten()).total / labels.numel()
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_model_that_has_learned_are_those_of_bfloat16(variant: str) -> None:
    """Queries start as long as training makes them: else 40 steps grow any rounding into another model, and how far
    float8 turns its gradient (cosines from 0.991 to 0.998 over six seeds) is another number on every processor."""
    model = Gemma4(config_of(variant))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.mul_(parameter.numel() ** -0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        losses.append(learn(model, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1
    found = {}
    for recipe in ("none", *RECIPES):
        copy = Gemma4(config_of(variant))
        copy.load_state_dict(model.state_dict())
        copy.bfloat16()
        apply_float8(copy, Float8Config(recipe))
        learn(copy, 100)
        found[recipe] = flat(whole_gradients(copy))
    alike = {recipe: cosine(found[recipe], found["none"]) for recipe in RECIPES}
    report(
        "Gradients in float8 against bfloat16 after 40 steps, cosine",
        {"variant": variant} | {recipe: f"{value:.4f}" for recipe, value in alike.items()},
    )
    for recipe, value in alike.items():
        hold("float8 against bfloat16 after 40 steps, 1 - cosine", 1 - value, 0.01, recipe)
        assert value < 0.99999


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_layers_compute_what_torchao_converts_them_to(variant: str, recipe: str) -> None:
    ours, theirs = build(variant), build(variant)
    apply_float8(ours, Float8Config(recipe))
    for module in ours.modules():
        if isinstance(module, Experts):
            module.grouped_mm = F.grouped_mm
    config = replace(torchao.float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    torchao.float8.convert_to_float8_training(
        theirs.language_model.layers, config=config, module_filter_fn=lambda _, name: "router" not in name
    )
    assert float(backward(ours)) == pytest.approx(float(backward(theirs)), rel=1e-5)
    found, wanted = whole_gradients(ours), whole_gradients(theirs)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputation_changes_nothing(recipe: str, mode: str) -> None:
    for variant in ("e2b", "26b_a4b"):
        (expected, wanted), (loss, found) = (trained(variant, recipe, torch.float32, m) for m in ("none", mode))
        assert loss == expected and found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_only_linear_layers_and_experts_of_the_decoder_are_touched() -> None:
    for variant in ("e4b", "26b_a4b"):
        with torch.device("meta"):
            model = Gemma4(Gemma4Config.from_name(f"tiny_{variant}"))
        before = dict(model.named_parameters())
        linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
        assert apply_float8(model, Float8Config("none")) == "none"
        assert all(m.product is F.linear for m in linears.values())
        described = apply_float8(model, Float8Config("rowwise"))
        assert described == "rowwise, emulated" + (", experts emulated" if variant == "26b_a4b" else "")
        assert list(model.named_parameters()) == list(before.items())  # the very same objects
        names = {name for name, m in linears.items() if m.product is not F.linear}
        kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        kinds += ["per_layer_input_gate", "per_layer_projection"]
        assert names == {
            name
            for name, m in model.named_modules()
            if name.startswith("language_model.layers.") and name.rpartition(".")[2] in kinds
        }
        assert any(name.endswith("router.proj") for name in linears) == (variant == "26b_a4b")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"intermediate_size": 72}, r"layers.0.mlp.gate_proj has a weight of \[72, 64\] .* legal: \[64, 64\]"),
        (
            {"hidden_size": 40, "hidden_size_per_layer_input": 0},
            r"self_attn.q_proj has a weight of \[64, 40\] .* legal: \[64, 32\]",
        ),
        ({"hidden_size_per_layer_input": 4}, r"per_layer_input_gate has a weight of \[4, 64\] .* legal: \[16, 64\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_a_gpu_would_refuse_are_refused(sizes: dict[str, int], message: str) -> None:
    with torch.device("meta"):
        model = Gemma4(config_of("e2b", **sizes))
    apply_float8(model, Float8Config("none"))
    with pytest.raises(ConfigError, match=message):
        apply_float8(model, Float8Config("tensorwise"))


MESHES = [
    *(("e2b", layout) for layout in (Layout(), Layout(dp_shard=2), Layout(tp=2))),
    *(("26b_a4b", layout) for layout in (Layout(), Layout(dp_shard=2), Layout(dp_shard=2, ep=2), Layout(tp=2))),
    ("26b_a4b", Layout(tp=2, sequence_parallel=False)),
]
"""No layout in which each rank rounds its part of a gradient: a KV head that ranks share, or layers on all tokens."""


def test_a_mesh_equals_one_rank() -> None:
    """Rowwise: its scales are powers of two, so that numbers are rounded alike whatever shares their row or rank.

    In float64, torchao's emulated sums too: a number within a rounding of the edge between two float8 values goes to
    either, on one rank or another processor, and is then off by a sixteenth. What is left are numbers so far below the
    largest of their row, which ranks share in gradients of weights, that float8 gives them fewer bits.
    """
    configs = {
        "e2b": config_of("e2b", num_key_value_heads=2),
        "26b_a4b": config_of("26b_a4b", num_global_key_value_heads=2),
    }

    def run(world: World) -> list[tuple[str, Layout, float, Tensor]]:
        found = []
        for variant, layout in MESHES:
            if layout.world_size == world.size:
                options = plans({"float8.recipe": "rowwise", "activation_checkpoint.mode": "full"})
                mesh, dtype = build_mesh(CPU, layout), torch.float64
                parallel = build_parallel_model(configs[variant], mesh, CPU, fill, options, compute_dtype=dtype)
                share = len(batch()[0]) // layout.dp
                start = layout.data_rank(world.rank) * share
                with patch.object(torch.Tensor, "float", torch.Tensor.double):
                    loss = backward(parallel.model, slice(start, start + share))
                torch.distributed.all_reduce(loss)
                found.append((variant, layout, float(loss) / layout.tp, flat(whole_gradients(parallel.model))))
        return found

    expected = {variant: (loss, gradient) for variant, _, loss, gradient in run_ranks(1, run)[0]}
    for variant, layout, loss, gradient in run_ranks(2, run)[0]:
        wanted_loss, wanted = expected[variant]
        errors = abs(loss / wanted_loss - 1), float((gradient - wanted).norm() / wanted.norm())
        report(
            "Meshes in float8 against one rank, rowwise",
            {"variant": variant, "mesh": layout, "loss": f"{errors[0]:.1e}", "gradient": f"{errors[1]:.1e}"},
        )
        hold("float8 on meshes, rowwise, float64", max(errors), 1e-5, (variant, layout))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_take_any_layout_and_number_of_tokens(recipe: str, dtype: torch.dtype) -> None:
    """Emulated, and as `torch._scaled_mm` computes them, which refuses what it cannot."""
    wide = drawn(200, 300)
    weights = {
        "plain": drawn(96, 64),
        "transposed": drawn(64, 96).T,
        "rows": wide[3:99, :64],
        "columns": wide[:96, 7:71],
    }
    for weight in weights.values():
        for tokens in (0, 1, 21, 32):
            results = []
            for product in (F.linear, *(float8_product(recipe, emulate=emulate) for emulate in (True, False))):
                x, w = (t.to(dtype).detach().requires_grad_() for t in (drawn(tokens, 64), weight))
                y = product(x, w)
                y.backward(drawn(tokens, 96).to(dtype))
                results.append((y.detach(), x.grad, w.grad))
            for plain, emulated, native in zip(*results, strict=True):
                assert plain.shape == emulated.shape == native.shape and plain.dtype == emulated.dtype == native.dtype
                if tokens == 0:
                    assert not emulated.any() and not native.any()
                else:
                    assert 0.99 < cosine(emulated, plain) < 0.99999 < cosine(native, emulated)


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_product_is_that_of_each_expert(recipe: str) -> None:
    """Equal to torchao's dense product where scales are alike; an expert without tokens, and no tokens, too."""
    ends = [5, 5, 21, 32]
    weight_ENK = drawn(4, 96, 64)
    for tokens in (32, 0):
        x, w = drawn(tokens, 64).requires_grad_(), weight_ENK.clone().requires_grad_()
        offsets = torch.tensor(ends if tokens else [0] * 4, dtype=torch.int32)
        y = float8_grouped_mm(recipe)(x, w.transpose(1, 2), offs=offsets)
        upstream = drawn(tokens, 96)
        y.backward(upstream)
        assert x.grad is not None and w.grad is not None
        if not tokens:
            assert y.shape == (0, 96) and not w.grad.any()
            continue
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            own = slice(start, end)
            plain_x, plain_w = x[own].detach().requires_grad_(), weight_ENK[expert].clone().requires_grad_()
            out = float8_product("rowwise", emulate=True)(plain_x, plain_w)
            out.backward(upstream[own])
            torch.testing.assert_close(y[own], out)
            assert plain_x.grad is not None and plain_w.grad is not None
            if start == end:
                assert not w.grad[expert].any()
                continue
            exact = upstream[own].T @ x[own].detach()
            assert 0.99 < cosine(w.grad[expert], exact) < 0.99999
            if recipe == "rowwise":
                torch.testing.assert_close(x.grad[own], plain_x.grad)
            else:
                assert 0.99 < cosine(x.grad[own], plain_x.grad) < 0.99999


def test_rounding() -> None:
    x = drawn(7, 33) * torch.logspace(-6, 6, 33)
    for dtype, bits in ((torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)):
        for dim in (0, 1):
            found = rounded(x, dim, dtype)
            near = x.abs() > x.abs().amax(dim, keepdim=True) * 2**-10
            assert ((found - x).abs() <= x.abs() * 2.0 ** -(bits + 1))[near].all() and (found != x).any()
            assert torch.equal(rounded(found, dim, dtype), found)
            assert torch.equal(rounded(x.bfloat16(), dim, dtype).float(), rounded(x.bfloat16().float(), dim, dtype))
    assert not rounded(torch.zeros(3, 4), 1).any()
