"""The command that says what kernels take of a GPU, where no kernel can be compiled."""

from __future__ import annotations

import pytest

from launch.benchmarks import kernels
from model import UserError


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^Triton is not installed; install it: pip install 'gemwright\[kernels\]'\.$"):
        kernels.budgets()
