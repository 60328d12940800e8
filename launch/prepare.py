"""Tokenise a source of texts once and keep the result, where runs on the same files find it.

    python -m launch.prepare                      # Python's own library, with a tokenizer trained on it
    python -m launch.prepare source=~/texts tokenizer=tokenizer.json

source is python_stdlib, a file, a folder or a glob, or hf:OWNER/NAME of the hub. Without a tokenizer, one of
vocab_size=8192 pieces is trained. cache names another place than ~/.cache/gemwright for the result. on_bad=skip leaves
out what cannot be read, and strict=true refuses keys and files that nothing reads. workers is how many processes
prepare, 0 for one on each processor; the result is the same. One that was killed goes on where it was.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data.corpus.prepare import Policy, prepare
from data.corpus.reading import ON_BAD
from data.corpus.report import report_lines
from data.corpus.sources import PYTHON_STDLIB
from data.corpus.text import TextFormat
from launch.arguments import run


@dataclass
class Options:
    """Arguments of `gemwright prepare`."""

    source: str = PYTHON_STDLIB
    tokenizer: str | None = None
    vocab_size: int = 8192
    cache: str | None = None
    on_bad: str = field(default="refuse", metadata={"choices": ON_BAD})
    strict: bool = False
    workers: int = 0


def prepare_texts(options: Options) -> None:
    """Tokenise texts into the cache, unless they are there, and print the folder and its size."""
    tokenizer = Path(options.tokenizer) if options.tokenizer else None
    cache = Path(options.cache) if options.cache else None
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    policy = Policy(options.on_bad, options.strict, workers=options.workers)
    corpus = prepare(options.source, TextFormat(tokenizer, options.vocab_size), cache, policy)
    print(report_lines(corpus.shard))


def main() -> None:
    """Prepare the texts that the command line names."""
    run(Options, prepare_texts, __doc__)


if __name__ == "__main__":
    main()
