"""Where documents come from: the corpus every Python brings along, or files named by the user."""

from __future__ import annotations

import glob
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.errors import UserError

PYTHON_STDLIB = "python_stdlib"
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# Tests are repetitive and often stripped by distributions; `encodings` is tables of hexadecimal.
_STDLIB_EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "__pycache__",
}


class SourceError(UserError):
    """A source that cannot be read."""


def source_files(source: str) -> list[Path]:
    """Files of a source, sorted: `python_stdlib`, a file, a folder, or a glob pattern.

    Raises `SourceError` if there is none.
    """
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            path
            for path in root.rglob("*")
            if path.suffix in _TEXT_SUFFIXES
            and not _STDLIB_EXCLUDED.intersection(path.relative_to(root).parts)
            and path.is_file()
        ]
        return sorted(files)
    path = Path(source).expanduser()
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix in (*_TEXT_SUFFIXES, ".jsonl") and p.is_file()]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not files:
        raise SourceError(
            f"data.source={source} names no text; give a file, a folder or a glob of "
            f"{', '.join(_TEXT_SUFFIXES)} or .jsonl files, or {PYTHON_STDLIB}."
        )
    return sorted(files)


def read_documents(files: list[Path]) -> Iterator[str]:
    """Documents in file order: a text file is one; a .jsonl file has one per line, under "text"."""
    for path in files:
        if path.suffix != ".jsonl":
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield text
            continue
        for where, found in read_lines(path):
            if not isinstance(found, dict) or not isinstance(found.get("text"), str):
                raise SourceError(f'{where} is no JSON object with a "text" string; mend or drop the line.')
            yield found["text"]


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Place ("file:line") and value of each line of JSON. Raises `SourceError` for one that is none."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found = [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise SourceError(f"{path}:{number} is not JSON ({error}); mend or drop the line.") from None
            yield from ((f"{path}:{number}", value) for value in found)
