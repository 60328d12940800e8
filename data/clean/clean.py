"""Filter the texts of a source, take out duplicates, and say what went and why."""

from __future__ import annotations

import importlib
import json
import logging
from typing import Any

from data.clean.folder import Folder, begin, held, make_plan
from data.clean.settings import CleanError, Cleaning, check

log = logging.getLogger("gemwright")


def clean(asked: Cleaning) -> dict[str, Any] | None:
    """The report of a cleaning that is done now, or was; none where jobs of SLURM have yet to do it.

    A cleaning that was killed goes on. Raises `UserError` for what cannot be read, written, or asked.
    """
    check(asked)
    _require_libraries(asked)
    from data.clean.executors import run_locally, submit

    plan = make_plan(asked)
    folder = begin(asked, plan)
    if not folder.report.is_file():
        log.info("tasks: %d, files: %d", len(plan.tasks), sum(map(len, plan.tasks)))
        with held(folder):
            (run_locally if asked.executor == "local" else submit)(asked, plan, folder)
    return _report(folder)


def _report(folder: Folder) -> dict[str, Any] | None:
    if not folder.report.is_file():
        return None
    found: dict[str, Any] = json.loads(folder.report.read_text(encoding="utf-8"))
    return found


def _require_libraries(asked: Cleaning) -> None:
    needed = dict.fromkeys(("datatrove.executor", "zstandard"), "gemwright[clean]")
    if asked.language:
        needed["fasttext"] = "fasttext-numpy2-wheel"
    for name, wheel in needed.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            package = (error.name or name).partition(".")[0]
            raise CleanError(f"cleaning takes {package}, which is not installed; pip install {wheel}.") from None
