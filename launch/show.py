"""Print conversations as the model reads them, with what it learns to write in colour.

    python -m launch.show                                       # a built-in conversation
    python -m launch.show file=chats.jsonl tokenizer=runs/mine/tokenizer.json size=large

file= may be given several times. A line is {"messages": [...]}, with "tools" if wanted, {"text": "..."}, or of another
shape that a run reads; shape=alpaca and 'columns={output: best_answer}' are its data.shape and data.columns. A media
part is shown as four soft tokens, whatever its file would give; keys that nothing reads are named as unused. Without a
tokenizer one is trained on each line.
size is small (E2B, E4B) or large (12B, 26B-A4B, 31B). Others: thinking=true as if every line had enable_thinking,
borders=true to see where tokens end, color=false for brackets instead (so does NO_COLOR in the environment).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from data.chat.read import read_conversations
from data.chat.shapes import AUTO, SHAPES, LineShape
from data.chat.show import DEMO, mark, shown_tokens
from data.tokenizer import load_tokenizer
from launch.arguments import run


@dataclass
class Options:
    """Arguments of `gemwright show`."""

    file: list[str] = field(default_factory=list)
    shape: str = field(default=AUTO, metadata={"choices": (AUTO, *SHAPES)})
    columns: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    size: str = "small"
    thinking: bool = False
    borders: bool = False
    color: bool = True


def show(options: Options) -> None:
    """Print conversations as the model sees them, supervised tokens in green or between brackets."""
    color = options.color and not os.environ.get("NO_COLOR")
    flags = {"enable_thinking": True} if options.thinking else {}
    tokenizer = load_tokenizer(Path(options.tokenizer)) if options.tokenizer else None
    shape = LineShape(options.shape, options.columns)
    for item in read_conversations(map(Path, options.file), shape) if options.file else [DEMO]:
        texts, encoded = shown_tokens(item, tokenizer, options.size, flags)
        total, learned = len(encoded.ids), sum(encoded.supervised)
        unused = f"; unused: {', '.join(item.unused)}" if item.unused else ""
        print(f"{item.where}: {total} tokens, {learned} supervised ({learned / total:.1%}){unused}")
        print(mark(texts, encoded.supervised, color, options.borders).rstrip("\n"), end="\n\n")


def main() -> None:
    """Show the files that the command line names, or a built-in conversation."""
    run(Options, show, __doc__)


if __name__ == "__main__":
    main()
