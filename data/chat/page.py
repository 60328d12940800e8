"""A page of HTML that shows what a run will train on: numbers of each file, and documents with what is learned.

The page is one file that loads nothing and runs nothing: pictures, sounds and styles are in it, and no script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from data.chat.markup import Shown, counted
from data.chat.previews import Measure
from data.chat.read import Conversation, PlainText
from data.chat.show import shown_tokens
from data.chat.visible import visible
from data.corpus.report import Class, bars, histogram
from data.media.read import sample_indices
from model.errors import UserError

_TEMPLATE = Path(__file__).parent / "page.html"
_NO_TOKENIZER = "No tokenizer was given, so one was trained on each line; a run's own makes fewer tokens."

Files: TypeAlias = Mapping[Path, Callable[[], Iterable[Conversation | PlainText]]]
"""Names of files, and what reads each from its beginning; media lie beside the file."""


class PageError(UserError):
    """A page that would show nothing."""


@dataclass(frozen=True)
class View:
    """How documents become tokens, and how many of each file are shown, spread evenly over it; 0 shows all."""

    tokenizer: Tokenizer | None = None
    size: str = "small"
    flags: dict[str, Any] = field(default_factory=dict)
    samples: int = 50


@dataclass(frozen=True)
class _File:
    """A file's numbers, those of all its documents, and the articles of some."""

    path: Path
    lengths: Sequence[int]
    learned: int
    articles: Sequence[str]


def make_page(files: Files, view: View, more: str = "") -> str:
    """HTML of the files: every document is counted, and some are shown. `more` is HTML that follows them.

    Raises `PageError` where there is no document, and what reading and encoding raise.
    """
    measure = Measure(view.size)
    read = [_read(path, items, view, measure) for path, items in files.items()]
    if not any(file.lengths for file in read):
        raise PageError(
            f"{', '.join(map(str, files))} holds no document to show; give a file with lines of "
            '{"messages": [...]} or {"text": "..."}.'
        )
    return _template().substitute(
        summary=_summary(read),
        note="" if view.tokenizer else f"<p class=note>{_NO_TOKENIZER}</p>",
        files="\n".join(_section(i, file) for i, file in enumerate(read)),
        more=more,
    )


def shown_document(item: Conversation | PlainText, folder: Path, view: View, measure: Measure) -> Shown:
    """The tokens of a line of a file in this folder, its media measured."""
    if isinstance(item, PlainText):
        return Shown(item, *shown_tokens(item, view.tokenizer, view.size, view.flags))
    kinds = [kind for kind, _, _ in item.render(view.size, **view.flags).media]
    parts = measure.parts(item, kinds, folder)
    return Shown(item, *shown_tokens(item, view.tokenizer, view.size, view.flags, parts), parts)


def _read(path: Path, items: Callable[[], Iterable[Conversation | PlainText]], view: View, measure: Measure) -> _File:
    total = sum(1 for _ in items())
    chosen = set(sample_indices(total, view.samples or total))
    lengths, learned, articles = list[int](), 0, list[str]()
    for i, item in enumerate(items()):
        shown = shown_document(item, path.parent, view, measure)
        lengths.append(len(shown.texts))
        learned += shown.learned
        if i in chosen:
            articles.append(shown.html())
    return _File(path, lengths, learned, articles)


def _summary(files: Sequence[_File]) -> str:
    """A table with a line for each file, and one of all if there are several."""
    rows = [
        _row(f'<a href="#file-{i}">{visible(str(file.path))}</a>', len(file.lengths), sum(file.lengths), file.learned)
        for i, file in enumerate(files)
    ]
    if len(files) > 1:
        documents, tokens = (sum(f(file.lengths) for file in files) for f in (len, sum))
        rows.append(_row("all", documents, tokens, sum(file.learned for file in files)))
    return "\n".join(rows)


def _row(name: str, documents: int, tokens: int, learned: int) -> str:
    numbers = (f"{documents:,}", f"{tokens:,}", f"{learned:,}", f"{learned / max(tokens, 1):.1%}")
    return f"<tr><th>{name}</th>{''.join(f'<td>{number}</td>' for number in numbers)}</tr>"


def _section(number: int, file: _File) -> str:
    total, shown = len(file.lengths), len(file.articles)
    some = f"{shown:,} of them below, spread evenly over the file" if shown < total else "all of them below"
    numbers = f"<span>{total:,} documents, {some}</span> {counted(sum(file.lengths), file.learned)}"
    return (
        f'<section id="file-{number}"><h2>{visible(str(file.path))}</h2>\n<p class=numbers>{numbers}</p>\n'
        f"{_bars(histogram(file.lengths))}\n{chr(10).join(file.articles)}</section>"
    )


def _bars(classes: Sequence[Class]) -> str:
    if not classes:
        return ""
    return (
        f"<div class=histogram>{bars(classes)}"
        "<span class=note>documents by their length: each bar begins at the number of tokens below it</span></div>"
    )


@cache
def _template() -> Template:
    return Template(_TEMPLATE.read_text(encoding="utf-8"))
