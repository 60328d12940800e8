"""Write questions and answers on Python's own library, to try fine-tuning with.

    python -m launch.questions out=questions.jsonl

Each line is a conversation of two messages: what a module, class, function or method does, and the first sentence of
its documentation. Nothing is downloaded; the library of the Python that runs this is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from data.chat.library_questions import library_questions
from launch.arguments import run
from model.errors import UserError


@dataclass
class Options:
    """Arguments of `gemwright questions`."""

    out: str = "questions.jsonl"


def write_questions(options: Options) -> None:
    """Write the conversations, and print how many there are."""
    path, lines = Path(options.out), []
    if path.exists():
        raise UserError(f"out={path} exists; name another file, or remove it.")
    for question, answer in library_questions():
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} questions with their answers")


def main() -> None:
    """Write the file that the command line names."""
    run(Options, write_questions, __doc__)


if __name__ == "__main__":
    main()
