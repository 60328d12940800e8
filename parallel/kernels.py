"""Which kernels compute a run on a GPU: Triton's or torch's, and whether Triton's say the same on this one.

The choice is `parallel.kernels`. Until a kind of card has run Triton's kernels nobody knows that it does, so a run that
takes them first compares each with torch's path, on a few numbers, and is refused where one is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from model import ConfigError, Gemma4Config
from model.attention_kernels import blocked, triton
from model.head import linear_cross_entropy
from model.masks import attention_mask
from model.mlp import gated_gelu
from model.moe import run_routed
from model.norm import RMSNorm, rms_norm
from model.rope import RotaryTable, norm_rotary
from model.triton_choice import has_triton, triton_for, use_triton

TOKENS = 100
_WITHIN = 2e-2
"""Relative difference that two ways of rounding to bfloat16 may have."""

Call = Callable[..., Tensor]


def choose_kernels(wanted: str, device: torch.device) -> bool:
    """Make the choice of this process; whether it is Triton. Raises `ConfigError` where there is no such choice."""
    if wanted == "triton" and device.type != "cuda":
        raise ConfigError(f"parallel.kernels=triton needs a GPU, this run is on {device.type}; nearest legal: auto.")
    if wanted == "triton" and not has_triton():
        raise ConfigError(
            "parallel.kernels=triton, but Triton is not installed; install it (pip install 'gemwright[kernels]'), or "
            "set parallel.kernels=torch."
        )
    chosen = wanted != "torch" and device.type == "cuda" and has_triton()
    use_triton(*([device.type] if chosen else []))
    return chosen


def check_kernels(config: Gemma4Config, device: torch.device, dtype: torch.dtype) -> str:
    """What each chosen kernel differs from torch's path by. Raises `ConfigError` where one is off, or does not run."""
    found: dict[str, float] = {}
    for name, run in kernel_differences(config, device, dtype):
        try:
            found[name] = run()
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"the kernel of {name} does not run on this GPU ({text}); set parallel.kernels=torch."
            ) from None
        if not found[name] < _WITHIN:
            raise ConfigError(
                f"the kernel of {name} is off by {found[name]:.1e} on this GPU; set parallel.kernels=torch."
            )
    return ", ".join(f"{name} {difference:.0e}" for name, difference in found.items())


def kernel_differences(
    config: Gemma4Config, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], float]]]:
    """For each kernel a call that says by how much values and gradients differ, relative to their norm."""

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return values.to(device, dtype).requires_grad_()

    def by_switch(call: Call, *inputs: Tensor) -> Callable[[], float]:
        return lambda: difference(_switched(call, device.type), _switched(call), inputs)

    width, eps = config.hidden_size, config.rms_norm_eps
    if dtype in (torch.bfloat16, torch.float16):
        for H in dict.fromkeys((config.head_dim, config.global_head_dim)):
            mask = attention_mask(1, TOKENS, window=TOKENS // 2).to(device)
            heads, keys = drawn(TOKENS, 2, H, scale=H**-0.5), [drawn(1, TOKENS, 1, H + extra) for extra in (0, 1)]
            inputs = (heads, *(x[..., :H] for x in keys))

            yield f"attention {H}", partial(difference, partial(triton, mask=mask), partial(blocked, mask=mask), inputs)
    x_TD, branch_TD = drawn(TOKENS, width), drawn(TOKENS, width)
    weight_D = (1 + drawn(width, scale=0.1).detach()).requires_grad_()
    yield "norm", by_switch(lambda x, w: rms_norm(x, w, eps), x_TD, weight_D)
    norm = RMSNorm(width, eps).to(device, dtype)
    yield "norm at the end of a branch", by_switch(norm.add_to, x_TD, branch_TD)
    angles = torch.linspace(0, 3, TOKENS * (config.head_dim // 2)).view(TOKENS, -1)
    table = RotaryTable(angles.cos().to(device, dtype), angles.sin().to(device, dtype))
    heads_TNH = drawn(TOKENS, 2, config.head_dim)
    yield "rotary embedding", by_switch(lambda x: norm_rotary(x, None, table, eps), heads_TNH)
    yield "gate", by_switch(gated_gelu, drawn(TOKENS, 96), drawn(TOKENS, 96))
    labels = torch.arange(TOKENS, device=device) % 64
    cap = config.final_logit_softcapping
    yield (
        "loss",
        by_switch(lambda h, w: linear_cross_entropy(h, w, labels, softcap=cap).total[None], x_TD, drawn(64, width)),
    )
    if config.enable_moe_block:
        indices = torch.stack([torch.randperm(4)[:2] for _ in range(TOKENS)]).to(device)
        weights = torch.linspace(0.1, 1, 2 * TOKENS, device=device).view(TOKENS, 2).requires_grad_()
        packed = (drawn(4, 64, 32, scale=0.2), drawn(4, 32, 32, scale=0.2))
        yield (
            "rows of experts",
            by_switch(lambda x, w, up, down: run_routed(x, w, indices, up, down), drawn(TOKENS, 32), weights, *packed),
        )


def _switched(call: Call, *device_types: str) -> Call:
    """The call with Triton's kernels for these devices alone; the choice of before is back behind it."""

    def switched(*inputs: Tensor) -> Tensor:
        with triton_for(*device_types):
            return call(*inputs)

    return switched


def difference(ours: Call, plain: Call, inputs: tuple[Tensor, ...]) -> float:
    """The largest relative difference of values and gradients."""
    found, expected = (_values_and_gradients(call, inputs) for call in (ours, plain))
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(found, expected, strict=True)
    )


def _values_and_gradients(call: Call, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
