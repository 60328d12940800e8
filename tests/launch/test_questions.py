"""Conversations made of the documentation in Python's library."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from data.chat.library_questions import library_questions
from launch import questions
from launch.questions import main


def test_questions_are_answered_in_the_library_s_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = list(islice(library_questions(), 400))
    assert len({pair.answer for pair in some}) == 400
    answers = {pair.question: pair.answer for pair in some}
    assert answers["What is ast.NodeVisitor?"].startswith(
        "A node visitor base class that walks the abstract syntax tree"
    )
    assert not any(part.startswith("_") for question in answers for part in question.rstrip("?").split()[-1].split("."))

    monkeypatch.setattr(questions, "library_questions", lambda: iter(some))
    out = tmp_path / "new" / "questions.jsonl"
    monkeypatch.setattr("sys.argv", ["questions", f"out={out}"])
    main()
    assert f"{out}: 400 questions" in capsys.readouterr().out
    lines = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [(user["content"], answer["content"]) for user, answer in lines] == some
    with pytest.raises(SystemExit, match="exists; name another file"):
        main()
