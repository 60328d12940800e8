"""What `gemwright show` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.chat.show import GREEN, LEFT, RESET, RIGHT
from data.tokenizer import train_tokenizer
from launch.show import main as show

GREEN_TEXT = re.compile(re.escape(GREEN) + "(.*?)" + re.escape(RESET))
THOUGHT = ["<|channel>thought", "An opera house like an iceberg: Oslo."]
CALL = '<channel|><|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>'
ANSWER = "Oslo, and yes: light rain.<turn|>"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def main(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["show", *map(str, arguments)])
        show()
        return capsys.readouterr().out

    monkeypatch.delenv("NO_COLOR", raising=False)
    return main


def test_colour_stands_around_exactly_what_is_supervised(run: Any) -> None:
    heading, _, body = run().partition("\n")
    assert GREEN_TEXT.findall(body) == [*THOUGHT, CALL, ANSWER]
    plain = body.replace(GREEN, "").replace(RESET, "")
    assert "\x1b" not in plain and plain.count("<|turn>model\n<|channel>thought\n") == 1
    assert plain.startswith("<bos><|turn>system\nYou are terse.<|tool>") and "<|image><|image|>x4<image|>Which" in plain
    found = re.fullmatch(r"demo: (\d+) tokens, (\d+) supervised \((.*)%\)", heading)
    assert found and abs(100 * int(found[2]) / int(found[1]) - float(found[3])) <= 0.05


@pytest.mark.parametrize("how", ["color=false", "NO_COLOR"])
def test_brackets_stand_there_without_colour(how: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    printed = run() if how == "NO_COLOR" else run(how)
    assert "\x1b" not in printed
    inside = re.findall(f"{LEFT}(.*?){RIGHT}", printed, re.DOTALL)
    assert inside == ["\n".join([*THOUGHT, CALL]), ANSWER]


def test_files_sizes_and_thinking(run: Any, tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "Hi", "name": "Ann"}], "add_generation_prompt": True, "id": 4},
        {"text": "plain ü"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(["Hi there, plain"], 400).save(str(tokenizer))
    printed = run(f"file={path}", f"tokenizer={tokenizer}", "size=large", "color=false")
    assert re.search(
        r"chats\.jsonl:1: \d+ tokens, 0 supervised \(0\.0%\); unused: messages\[\]\.name, id\n<bos>", printed
    )
    assert printed.count("unused") == 1
    assert "<|turn>model\n<|channel>thought\n<channel|>\n\n" in printed
    assert printed.endswith(f"<bos>{LEFT}plain ü<eos>{RIGHT}\n\n")
    assert "<|turn>model\n\n" in run(f"file={path}", "color=false") and "<|think|>" in run(
        f"file={path}", "thinking=true"
    )


def test_lines_of_other_shapes_are_shown_as_they_are_learned(run: Any, tmp_path: Path) -> None:
    lines = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"instruction": "Say", "input": "it", "output": "so"},
        {"prompt": "One", "completion": "two"},
        {"query": "Three", "response": "four"},
        {"contents": [{"role": "user", "parts": [{"text": "Five"}]}, {"role": "model", "parts": [{"text": "six"}]}]},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    learned = re.compile(f"{LEFT}(.*?){RIGHT}")
    answers = [f"{answer}<turn|>" for answer in ("Ho", "so", "two", "four", "six")]
    assert learned.findall(run(f"file={path}", "color=false")) == answers
    path.write_text(json.dumps({"ask": "Hi", "say": "Ho", "text": "Hi Ho"}))
    columns = "columns={query: ask, response: say}"
    assert learned.findall(run(f"file={path}", "color=false", columns, "shape=query")) == ["Ho<turn|>"]
    for bad, said in (
        ("shape=quary", "shape=quary does not exist; nearest: query"),
        ("columns={query ask}", "columns={query ask} has the wrong type; columns is {NAME: TEXT, ...}."),
        (columns, "chats.jsonl:1 can be read as query (ask, say) and as text (text); set data.shape=query or data"),
    ):
        with pytest.raises(SystemExit, match=re.escape(said)):
            run(f"file={path}", bad)


def test_errors_are_one_line(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "see <|image|>"}]}), encoding="utf-8")
    for argument in (f"file={path}", f"file={tmp_path / 'none.jsonl'}", f"tokenizer={tmp_path / 'none.json'}"):
        with pytest.raises(SystemExit) as left:
            run(argument)
        printed = str(left.value.code)
        assert printed.startswith("error: ") and "\n" not in printed
        assert str(path) not in argument or "chats.jsonl:1: a text spells the media token <|image|>" in printed
