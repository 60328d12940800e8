"""float8: the products of the decoder's linear layers and experts on operands rounded to 8 bits; masters stay float32.

| part                                                              | product                                     |
|-------------------------------------------------------------------|---------------------------------------------|
| q, k, v, o, gate, up, down, per_layer_input_gate, per_layer_projection | torchao's: `torch._scaled_mm` on a GPU |
| experts                                                           | grouped product of operands rounded to float8 |
| token table = head, router, towers, per_layer_model_projection    | not float8                                  |

Operands are e4m3; gradients are e5m2 by the tensorwise recipe and e4m3 by the rowwise one. The
rowwise recipe and the experts scale each row along the axis that is summed over, by a power of
two, so that a number is rounded alike whatever shares its row or, on a mesh, its rank. Where ranks
have parts of a gradient (see `parallel.collectives`), each rounds its own.

Letters of this file: K in-features and N out-features of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Gemma4
from model.errors import ConfigError
from model.linear import Linear, Product
from model.moe import Experts, grouped_mm
from parallel.expert import ParallelExperts
from parallel.options import Float8Config

GRADIENT_DTYPES = {"tensorwise": torch.float8_e5m2, "rowwise": torch.float8_e4m3fn}
_MULTIPLE = 16
"""`torch._scaled_mm` wants both sizes of a weight, and the number of tokens in its gradient, to be multiples of it."""


def apply_float8(model: Gemma4, options: Float8Config) -> str:
    """Let a model on `meta` compute products in float8, after the plans that split its layers.

    Returns what computes the products, for the log. Raises `ConfigError` where a weight has sizes
    that a GPU would refuse, also where float8 is only emulated.
    """
    recipe = options.recipe
    if recipe == "none":
        return recipe
    native = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    product = float8_product(recipe, emulate=not native)
    for name, linear in _linears(model):
        _check_sizes(name, linear.local_weight(), recipe)
        linear.product = product
    experts = [module for module in model.modules() if isinstance(module, Experts | ParallelExperts)]
    for module in experts:
        module.grouped_mm = float8_grouped_mm(recipe)
    return f"{recipe}, {'scaled_mm' if native else 'emulated'}" + (", experts emulated" if experts else "")


def _linears(model: Gemma4) -> Iterator[tuple[str, Linear]]:
    """The decoder's linear layers; a router, whose choices are final, keeps its product."""
    for name, module in model.language_model.named_modules(prefix="language_model"):
        if isinstance(module, Linear) and not name.endswith(".router.proj"):
            yield name, module


def _check_sizes(path: str, weight_NK: Tensor, recipe: str) -> None:
    sizes = list(weight_NK.shape)
    legal = [max(round(size / _MULTIPLE), 1) * _MULTIPLE for size in sizes]
    if sizes != legal:
        raise ConfigError(
            f"float8.recipe={recipe} needs sizes that are multiples of {_MULTIPLE}, but {path} has a weight of {sizes} "
            f"on each rank; nearest legal: {legal}, or float8.recipe=none."
        )


def float8_product(recipe: str, *, emulate: bool) -> Product:
    """`F.linear` in float8, forward and backward, of plain tensors of any layout."""
    # imports slowly, so only when asked for
    from torchao.float8 import Float8LinearConfig, LinearMMConfig, ScaledMMConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    products = LinearMMConfig(
        *(
            ScaledMMConfig(emulate, gemm.use_fast_accum)
            for gemm in (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
        )
    )

    def product(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        # Tokens may be any number, also none. Zero rows neither change a scale nor add to a gradient.
        tokens = len(x_TK)
        missing = -tokens % _MULTIPLE if tokens else _MULTIPLE
        padded = F.pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
        return matmul_with_hp_or_float8_args.apply(padded, weight_NK.t(), products, config)[:tokens]

    return product


def float8_grouped_mm(recipe: str) -> Callable[..., Tensor]:
    """`F.grouped_mm` of x [T, K] and weights [E, K, N] on rounded operands, forward and backward."""

    def product(x_TK: Tensor, weight_EKN: Tensor, *, offs: Tensor) -> Tensor:
        return _GroupedProduct.apply(x_TK, weight_EKN, offs, GRADIENT_DTYPES[recipe])

    return product


class _GroupedProduct(torch.autograd.Function):
    """Keeps its operands as they came and rounds them again in the backward; no rounded weight stays in memory."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_EKN: Tensor, offsets_E: Tensor, gradient_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TK, weight_EKN, offsets_E)
        ctx.gradient_dtype = gradient_dtype
        return grouped_mm(rounded(x_TK, -1), rounded(weight_EKN, -2), offs=offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TK, weight_EKN, offsets_E = ctx.saved_tensors
        grad_x = grouped_mm(
            rounded(grad_TN, -1, ctx.gradient_dtype), rounded(weight_EKN, -1).transpose(-2, -1), offs=offsets_E
        )
        grad_weight = grouped_mm(
            rounded(x_TK, 0).transpose(0, 1), rounded(grad_TN, 0, ctx.gradient_dtype), offs=offsets_E
        )
        return grad_x, grad_weight, None, None


def rounded(x: Tensor, dim: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x as `dtype` holds it, with one scale, a power of two, for all numbers along `dim`; in the dtype of x."""
    if not x.numel():
        return x
    largest = x.abs().amax(dim, keepdim=True).float().clamp_min(1e-12)
    exponent = torch.log2(torch.finfo(dtype).max / largest).floor()
    scale = torch.exp2(exponent).to(x.dtype)
    return (x * scale).to(dtype).to(x.dtype) / scale
