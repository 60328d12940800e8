"""The table of tensor parallel against the modules that decoder layers have."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from model import Gemma4, Gemma4Config
from model.linear import Linear
from parallel.tensor.plan import LAYER, Split, split_of
from tests.harness.meshes import VARIANTS


def with_parameters(variant: str) -> set[str]:
    """Modules of any layer that have parameters of their own."""
    with torch.device("meta"):
        model = Gemma4(Gemma4Config.from_name(f"gemma4_tiny_{variant}"))
    modules = [pair for layer in model.layers for pair in layer.named_modules()]
    return {name for name, module in modules if next(module.parameters(recurse=False), None) is not None}


def test_every_module_is_in_one_row_and_every_row_has_a_module() -> None:
    names = {name for variant in VARIANTS for name in with_parameters(variant)}
    splits = {name: split_of(name) for name in names}
    assert set(splits.values()) == set(Split)
    assert splits["self_attn.q_proj"] is Split.OUTPUTS and splits["mlp.down_proj"] is Split.INPUTS
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    split = {name.rpartition(".")[2] for name, kind in splits.items() if kind.value.startswith("by")}
    assert split == linears
    assert {pattern for pattern in LAYER for name in names if fnmatch(name, pattern)} == LAYER.keys()


def test_a_module_in_no_row_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"self_attn\.s_proj is in 0 rows"):
        split_of("self_attn.s_proj")


def test_an_adapter_is_split_where_its_layer_is() -> None:
    """A split by outputs is in b and one by inputs in a; the other half is whole."""
    halves = {
        layer: (split_of(f"{layer}.adapter.a"), split_of(f"{layer}.adapter.b"))
        for layer in ("mlp.up_proj", "mlp.down_proj", "self_attn.k_proj", "per_layer_input_gate")
    }
    assert halves == {
        "mlp.up_proj": (Split.WHOLE, Split.OUTPUTS),
        "mlp.down_proj": (Split.INPUTS, Split.WHOLE),
        "self_attn.k_proj": (Split.WHOLE, Split.KV_HEADS),
        "per_layer_input_gate": (Split.WHOLE, Split.WHOLE),
    }


def test_the_parts_of_a_linear_layer() -> None:
    """y = after(product(x, read(weight)) + adapter(x))."""
    torch.manual_seed(0)
    linear, x = Linear(4, 6), torch.randn(3, 4)
    torch.testing.assert_close(linear(x), x @ linear.weight.T)
    linear.read = lambda weight: weight[2:4]
    linear.product = lambda x, weight: 2 * (x @ weight.T)
    linear.adapter = nn.Linear(4, 2, bias=False)
    linear.after = lambda y: y.cumsum(0)
    expected = (2 * (x @ linear.weight[2:4].T) + x @ linear.adapter.weight.T).cumsum(0)
    torch.testing.assert_close(linear(x), expected)
    assert {name for name, _ in linear.named_parameters()} == {"weight", "adapter.weight"}
