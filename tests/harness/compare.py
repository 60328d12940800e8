"""How tests compare numbers: every difference stands beside its bound, and the worst of each kind is reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

worst: dict[str, tuple[float, float]] = {}
"""The difference that came nearest to its bound in each kind of comparison, and that bound."""


def hold(kind: str, error: float, bound: float, where: object = "") -> None:
    """Fail where an error is not below its bound. A kind is what a line of the final table is about."""
    merge({kind: (error, bound)})
    assert error < bound, f"{kind}: {error:.2e} is not below {bound:.2e} {where}"


def merge(found: dict[str, tuple[float, float]]) -> None:
    """Add what was held here or in another process."""
    for kind, (error, bound) in found.items():
        if kind not in worst or error / bound > worst[kind][0] / worst[kind][1]:
            worst[kind] = error, bound


def largest(errors: dict[str, float]) -> tuple[float, str]:
    """The largest of named errors, and its name."""
    name = max(errors, key=lambda n: errors[n])
    return errors[name], name


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
