"""What the guards read of the repository's own files: imports, private names, prose, config keys, headings."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("model", "parallel", "data", "train", "launch", "configs")
LIBRARIES = ("torch", "torchao", "torchdata", "torchtitan")


class Source(NamedTuple):
    """A Python file of the product."""

    name: str
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.name.partition("/")[0]


class Import(NamedTuple):
    line: int
    module: str
    name: str
    """The name in `from module import name`; empty for `import module`."""
    at_start: bool
    """When the file itself is imported: neither in a function nor for type checkers alone."""

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}".rstrip(".")


@cache
def files() -> list[str]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in sorted(set(listed)) if (ROOT / name).is_file()]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8", errors="replace")


@cache
def product() -> list[Source]:
    names = [name for name in files() if name.endswith(".py") and name.partition("/")[0] in PRODUCT]
    return [Source(name, text_of(name), ast.parse(text_of(name), name)) for name in names]


def imports(node: ast.AST, at_start: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(child.lineno, alias.name, "", at_start) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from (Import(child.lineno, module, alias.name, at_start) for alias in child.names)
        elif not isinstance(child, ast.expr):
            for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from imports(child, at_start and not for_types and not isinstance(child, ast.FunctionDef))


def private(path: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in path.split("."))


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a file makes. One that torch's classes have is not its own but overrides theirs."""
    made = {"_make", "_replace", "_asdict", "_fields"}  # named tuples document these
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                made.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                made.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                made.add(name)
    return made - {name for owner in (nn.Module, torch.optim.AdamW, torch.autograd.Function) for name in dir(owner)}


def private_names(source: Source) -> Iterator[tuple[int, str]]:
    """Lines and names of what is private in the libraries."""
    own, elsewhere = own_names(source.tree), set()
    for found in imports(source.tree):
        if found.module.partition(".")[0] not in LIBRARIES:
            elsewhere.add(found.name or found.module.partition(".")[0])
        elif private(found.path):
            yield found.line, found.path
    for node in ast.walk(source.tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in elsewhere:
                pass
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.keyword(arg=str(name)):
                if private(name) and name not in own:
                    yield node.lineno, name


def docstring(node: ast.AST) -> str | None:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text.strip()
    return None


def fields(tree: ast.Module) -> dict[str, tuple[int, bool]]:
    """The line of each `Class.field`, and whether a docstring follows."""
    return {
        f"{node.name}.{ast.unparse(statement.target)}": (statement.lineno, bool(docstring(after)))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement, after in pairwise([*node.body, node])
        if isinstance(statement, ast.AnnAssign)
    }


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all that is no section in a recipe."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from keys_of(child, f"{prefix}.{name}")
    else:
        yield prefix.removeprefix(".")


def headings(text: str) -> set[str]:
    """The anchors of a Markdown text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def prose(source: Source) -> Iterator[tuple[int, str]]:
    """Lines and texts of docstrings, those of fields too, and of each line of a comment."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Expr) and (text := docstring(node)):
            yield node.lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
