from __future__ import annotations

from typing import Any

import torch

from tests.report import render

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(render())
