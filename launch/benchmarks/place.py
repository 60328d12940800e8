"""Where the checks of a GPU run, and how far a number may be off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import Gemma4, Gemma4Config
from model.init import init_parameters


class Wrong(Exception):
    """A number outside of its bound."""


@dataclass
class Place:
    """Where checks run: a GPU at the sizes of released models, or a CPU at small ones."""

    device: torch.device

    @property
    def real(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    def size(self, real: int, small: int) -> int:
        """A size for this device."""
        return real if self.real else small

    def tiny(self, name: str) -> Gemma4Config:
        """A tiny variant, on a GPU with heads of the released widths, by which kernels are chosen."""
        widths = {"head_dim": self.size(256, 16), "global_head_dim": self.size(512, 32)}
        return Gemma4Config.from_name(f"gemma4_tiny_{name}", **widths).replace(vision=None, audio=None)

    def model(self, config: Gemma4Config, dtype: torch.dtype) -> Gemma4:
        """Drawn weights in a dtype, buffers in float32; scores of about 1, since larger ones leave one key each."""
        model = Gemma4(config)
        init_parameters(model, 0, config.initializer_range, config.pad_token_id)
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.data.fill_(parameter.numel() ** -0.5)
            parameter.data = parameter.data.to(dtype)
        return model.to(self.device)

    def drawn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal numbers, the same for every dtype and device."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale
        return values.to(self.device, dtype).requires_grad_()

    def seconds(self, call: Callable[[], Any]) -> float:
        """Time of a call, after one that warms up."""
        call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.real:
            torch.cuda.synchronize()

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """An error for whatever makes the host wait for the GPU."""
        if self.real:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.real:
                torch.cuda.set_sync_debug_mode("default")


def near(name: str, found: Tensor, expected: Tensor, bound: float) -> float:
    """Norm of the difference over the norm of what is expected. Raises `Wrong` above the bound."""
    expected = expected.double()
    off = ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    if not off <= bound:
        raise Wrong(f"{name} is off by {off:.1e}, allowed is {bound:.0e}")
    return off
