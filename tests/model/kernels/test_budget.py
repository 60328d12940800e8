"""What kernels take of a GPU: no more than it has, and what docs/kernels.md says."""

from __future__ import annotations

import pytest

from launch.benchmarks.kernels import DOCUMENT, GPUS, Budget, budgets, document
from tests.model.kernels.conftest import requires_compiler

requires_compiler()


@pytest.fixture(scope="module")
def found() -> list[Budget]:
    return budgets()


def test_every_kernel_fits_every_gpu(found: list[Budget]) -> None:
    names = [(budget.gpu, budget.kernel) for budget in found]
    assert len(names) == len(set(names)), "a row of the tables is known by its name"
    assert {gpu.name for gpu in GPUS} == {gpu for gpu, _ in names}
    assert [f"{budget.gpu}, {budget.kernel}: {budget.problem}" for budget in found if budget.problem] == []


def test_the_tables_are_what_the_compiler_says(found: list[Budget]) -> None:
    place = list(found[0].cells).index("estimated µs") + 1

    def rows(text: str) -> list[list[str]]:
        cells = [line.split("|") for line in text.splitlines() if line.startswith("|")]
        return [row[:place] + row[place + 1 :] for row in cells]

    assert rows(DOCUMENT.read_text()) == rows(document(found)), "python -m launch.benchmarks.kernels write=true"
