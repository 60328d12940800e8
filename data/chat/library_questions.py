"""Questions and answers made of the documentation in Python's own library: conversations to try fine-tuning with."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.corpus.sources import PYTHON_STDLIB, source_files

_SHORTEST, _LONGEST = 20, 300
"""Characters of an answer."""


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def library_questions() -> Iterator[Pair]:
    """What each public module, class, function and method of Python's library is for, in its author's words.

    The order is that of files and lines; no answer comes twice. Nothing of the library is imported.
    """
    root, seen = Path(sysconfig.get_paths()["stdlib"]), set[str]()
    for path in source_files(PYTHON_STDLIB).files:
        parts = path.relative_to(root).with_suffix("").parts
        if path.suffix != ".py" or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        tree = ast.parse(path.read_bytes())
        for pair in _pairs(tree, ".".join(part for part in parts if part != "__init__")):
            if pair.answer not in seen:
                seen.add(pair.answer)
                yield pair


def _pairs(tree: ast.Module, module: str) -> Iterator[Pair]:
    yield from _pair(tree, f"What is the module {module} for?")
    for node in tree.body:
        yield from _described(node, module)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                yield from _described(inner, f"{module}.{node.name}")


def _described(node: ast.stmt, owner: str) -> Iterator[Pair]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
        words = "What is {}?" if isinstance(node, ast.ClassDef) else "What does {} do?"
        yield from _pair(node, words.format(f"{owner}.{node.name}"))


def _pair(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, question: str) -> Iterator[Pair]:
    """The pair of a node whose documentation begins with a sentence of sensible length."""
    first = (ast.get_docstring(node) or "").split("\n\n")[0]
    sentence = re.match(r".*?[.!?](?=\s|$)", " ".join(first.split()))
    answer = sentence.group() if sentence else ""
    if _SHORTEST <= len(answer) <= _LONGEST and answer.isascii():
        yield Pair(question, answer)
