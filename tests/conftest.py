from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.report import merge, render, tables

torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of several processes, this is not the one that prints
        session.config.workeroutput["tables"] = tables


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    merge(getattr(node, "workeroutput", {}).get("tables", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(render())
