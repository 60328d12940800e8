"""How tests compare numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def relative_error(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """A model in float64 meanwhile; gradients that were taken stay so."""
    model.double()
    yield
    model.zero_grad()  # or they would become float32 with it
    model.float()
