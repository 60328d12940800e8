from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import compare
from tests.harness.report import merge, render, report, tables

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", type=Path, help="write the worst error of each kind, and its bound, to this JSON file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of several processes, this is not the one that prints
        session.config.workeroutput |= {"tables": tables, "worst": compare.worst}
    elif session.config.getoption("errors"):
        session.config.getoption("errors").write_text(json.dumps(compare.worst))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    merge(output.get("tables", {}))
    compare.merge({kind: tuple(pair) for kind, pair in output.get("worst", {}).items()})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for kind, (error, bound) in sorted(compare.worst.items()):
        row = {"what": kind, "worst": f"{error:.1e}", "bound": f"{bound:.1e}", "of it": f"{error / bound:.1%}"}
        report("Worst errors beside their bounds", row)
    terminalreporter.write_line(render())
