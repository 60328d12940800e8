"""Print conversations as the model reads them, with what it learns to write in colour.

    python -m launch.show                                       # a built-in conversation
    python -m launch.show file=chats.jsonl tokenizer=runs/mine/tokenizer.json size=large

file= may be given several times. A line is {"messages": [...]}, with "tools" if wanted, {"text": "..."}, or of another
shape that a run reads; shape=alpaca and 'columns={output: best_answer}' are its data.shape and data.columns. A media
part is shown as four soft tokens, whatever its file would give; keys that nothing reads are named as unused. Without a
tokenizer one is trained on each line.

    python -m launch.show file=chats.jsonl tokenizer=runs/mine/tokenizer.json html=page.html

writes one page that a browser opens without any network: for each file its counts and a histogram of lengths, and
samples=50 of its documents, spread evenly over it (0 for all), with pictures and players where their soft tokens are,
of which it has the real number. Every document is read to be counted.

    python -m launch.show source=chats.jsonl format=chat sequence_length=1024 rows=8 html=page.html tokenizer=...

also shows the first rows of a run on that data.source (a file, folder or glob; format=text for texts): how documents
are packed. The prepared source is kept in the cache, as a run keeps it.

size is small (E2B, E4B) or large (12B, 26B-A4B, 31B). Others: thinking=true as if every line had enable_thinking,
borders=true to see where tokens end, color=false for brackets instead (so does NO_COLOR in the environment).
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.chat.page import Files, PageError, View, make_page
from data.chat.read import read_conversations
from data.chat.render import SIZES
from data.chat.rows import files_of, open_source, rows_html
from data.chat.shapes import AUTO, SHAPES, LineShape
from data.chat.show import DEMO, mark, shown_tokens
from data.corpus.open import FORMATS, Source
from data.tokenizer import load_tokenizer
from launch.arguments import run
from model.errors import UserError


@dataclass
class Options:
    """Arguments of `gemwright show`."""

    file: list[str] = field(default_factory=list)
    shape: str = field(default=AUTO, metadata={"choices": (AUTO, *SHAPES)})
    columns: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    size: str = field(default="small", metadata={"choices": SIZES})
    thinking: bool = False
    borders: bool = False
    color: bool = True
    html: str | None = None
    samples: int = 50
    source: str | None = None
    format: str = field(default="chat", metadata={"choices": (*FORMATS,)})
    sequence_length: int = 1024
    rows: int = 8


def show(options: Options) -> None:
    """Print conversations as the model sees them, or write a page of them."""
    _check(options)
    if options.html:
        write_page(options, Path(options.html))
    else:
        print_tokens(options)


def write_page(options: Options, target: Path) -> None:
    """Write a page of the files or the source that the options name, or of a built-in conversation."""
    if target.suffix != ".html":
        raise PageError(f"html={target} does not end in .html, and might be other data; name a page.")
    path = Path(options.tokenizer) if options.tokenizer else None
    view = View(load_tokenizer(path) if path else None, options.size, _flags(options), options.samples)
    shape = LineShape(options.shape, options.columns)
    files: Files = {Path(file): partial(read_conversations, [Path(file)], shape) for file in options.file}
    rows = ""
    if options.source:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        source = Source(options.source, 1, options.format, shape=shape)
        data = open_source(source, options.sequence_length, path, options.size, options.thinking)
        files, view, rows = files_of(source), replace(view, tokenizer=data.tokenizer), rows_html(data, options.rows)
    target.write_text(make_page(files or {Path("demo"): lambda: [DEMO]}, view, rows), encoding="utf-8")
    print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB")


def print_tokens(options: Options) -> None:
    """Print conversations, supervised tokens in green or between brackets."""
    tokenizer = load_tokenizer(Path(options.tokenizer)) if options.tokenizer else None
    color = options.color and not os.environ.get("NO_COLOR")
    shape = LineShape(options.shape, options.columns)
    for item in read_conversations(map(Path, options.file), shape) if options.file else [DEMO]:
        texts, encoded = shown_tokens(item, tokenizer, options.size, _flags(options))
        total, learned = len(encoded.ids), sum(encoded.supervised)
        unused = f"; unused: {', '.join(item.unused)}" if item.unused else ""
        print(f"{item.where}: {total} tokens, {learned} supervised ({learned / total:.1%}){unused}")
        print(mark(texts, encoded.supervised, color, options.borders).rstrip("\n"), end="\n\n")


def _check(options: Options) -> None:
    """Raises `UserError` for what would have no effect, or is out of bounds."""
    defaults = {field.name: field.default for field in fields(options)}
    for names, needed, is_given in (
        (("samples", "source"), "html=page.html", options.html),
        (("format", "sequence_length", "rows"), "source=chats.jsonl", options.source),
    ):
        for name in names:
            if getattr(options, name) != defaults[name] and not is_given:
                raise UserError(
                    f"{name}={getattr(options, name)} has no effect without {needed}; add that, or drop it."
                )
    if options.source and options.file:
        raise UserError(f"source={options.source} and file= are two ways to name what is shown; give one.")
    if options.source and options.format == "chat" and not options.tokenizer:
        raise UserError(f"source={options.source} with format=chat needs tokenizer=; give the model's own.")
    for name, least in (("samples", 0), ("rows", 0), ("sequence_length", 2)):
        if getattr(options, name) < least:
            raise UserError(f"{name}={getattr(options, name)} is below {least}; give {least} or more.")


def _flags(options: Options) -> dict[str, Any]:
    return {"enable_thinking": True} if options.thinking else {}


def main() -> None:
    """Show the files that the command line names, or a built-in conversation."""
    run(Options, show, __doc__)


if __name__ == "__main__":
    main()
