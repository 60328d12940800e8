"""Packed rows in a page: what the tensors of the rows say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data.batch import IGNORE
from data.chat.rows import open_source, rows_html, token_texts
from data.corpus.open import Data, Source
from launch.show import main as show
from tests.harness.chat_files import TOKENIZER, chat, model, text, user, write, write_media
from tests.harness.html import ATTRIBUTES, HOSTILE, TAGS, Page


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))


def opened(folder: Path, lines: Iterable[dict[str, Any]], length: int) -> Data:
    write(folder, lines)
    source = Source(str(folder / "chats.jsonl"), 1, "chat")
    return open_source(source, length, folder / "tokenizer.json", "small", thinking=False)


def test_each_token_has_its_text_and_shared_characters_stand_with_the_last() -> None:
    words = "<|turn>model\nü 🦜 is a bird\N{REPLACEMENT CHARACTER}.<turn|>"
    ids = TOKENIZER.encode(words, add_special_tokens=False).ids
    texts = token_texts(ids, TOKENIZER)
    assert len(texts) == len(ids) and "".join(texts) == words
    assert texts[:2] == ["<|turn>", "m"] and texts[texts.index("🦜") - 3 : texts.index("🦜")] == ["", "", ""]
    parrot = TOKENIZER.encode("🦜", add_special_tokens=False).ids
    assert "".join(token_texts(parrot[:2], TOKENIZER)) == ""
    assert token_texts([*parrot[:3], *parrot[:3]], TOKENIZER)[3] != ""  # no more than four tokens share one


def test_rows_show_what_their_tensors_hold(tmp_path: Path) -> None:
    write_media(tmp_path)
    lines = [chat(user(text("What is it? " * (1 + i % 4))), model("A cat.", reasoning="ü")) for i in range(9)]
    lines += [chat(user({"type": "image", "path": "cat.png"}, text("this?")), model("A film."))]
    data = opened(tmp_path, lines, 320)
    dataset = data.datasets[0]
    total = dataset.sequences_per_epoch
    assert total > 1
    html = rows_html(data, 99)
    articles = re.findall("<article>.*?</article>", html, re.DOTALL)
    assert len(articles) == total and len(re.findall("<article>", rows_html(data, 1))) == 1
    documents = []
    for i, article in enumerate(articles):
        row, found = dataset[i], Page(article)
        filled = int((row.document_ids_S < row.document_ids_S[-1]).sum())
        labels = [int(label) for label in row.labels_S if label != IGNORE]
        assert found.learned == TOKENIZER.decode(labels, skip_special_tokens=False)
        number = len(dataset.pieces(i))
        numbers = f"row {i} {number} documents {filled} tokens {len(labels)} labels ({len(labels) / 320:.1%}) "
        assert f"{numbers}{320 - filled} empty ({(320 - filled) / 320:.1%})" in found.text
        documents += [int(name) for name in re.findall(r"document (\d+)<br>", article)]
        bars: dict[str, int] = {}
        for bar in found.all("rect"):
            bars[str(bar["class"])] = bars.get(str(bar["class"]), 0) + int(str(bar["width"]))
        assert bars["learned"] == len(labels) and bars["even"] + bars.get("odd", 0) == filled
        runs = re.findall("<\\|image\\|>\N{MULTIPLICATION SIGN}(\\d+)", found.text)
        soft = row.tokens_S.tolist().count(TOKENIZER.token_to_id("<|image|>"))
        assert [int(run) for run in runs] == [soft] * bool(soft)
        assert len(found.tokens) + soft <= filled and "".join(found.tokens).count("<bos>") == number
    assert sorted(documents) == [*range(10)]


def test_rows_of_hostile_conversations_are_inert(tmp_path: Path) -> None:
    data = opened(tmp_path, [chat(user(text(bad)), model(bad), **{bad: 1}) for bad in HOSTILE], 512)
    found = Page(rows_html(data, 8))
    assert {name for name, _ in found.elements} <= TAGS and not found.open
    assert {key for _, attributes in found.elements for key in attributes} <= ATTRIBUTES
    assert found.text.count("<script>alert(1)</script>") >= 2 and "\x1b" not in found.text


def test_a_source_is_shown_with_documents_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"<|turn> What is it? A cat {i}.", encoding="utf-8")
    write(tmp_path, [chat(user(), model())] * 3)
    target = tmp_path / "page.html"

    def run(*arguments: str) -> Page:
        monkeypatch.setattr("sys.argv", ["show", f"tokenizer={tmp_path / 'tokenizer.json'}", *arguments])
        show()
        return Page(target.read_text(encoding="utf-8"))

    texts = run(f"source={tmp_path / 'texts'}", "format=text", "sequence_length=16", "rows=2", f"html={target}")
    assert texts.text.count("<|turn> What is it? A cat ") >= 4 and "4 documents, all of them below" in texts.text
    assert "Packed rows of 16" in texts.text and len(texts.all("article")) == 4 + 2
    chats = run(f"source={tmp_path}/*.jsonl", "sequence_length=64", "rows=1", f"html={target}")
    assert len(chats.all("article")) == 3 + 1 and "Packed rows of 64" in chats.text
    assert capsys.readouterr().out.endswith(f"{target}: 0.0 MB\n")
    both = f"source={tmp_path} and file= are two ways to name what is shown; give one."
    short = "sequence_length=1 is below 2; give 2 or more."
    for arguments, said in (("file=x.jsonl", both), ("sequence_length=1", short)):
        with pytest.raises(SystemExit) as left:
            run(f"source={tmp_path}", f"html={target}", arguments)
        assert left.value.code == f"error: {said}"
    monkeypatch.setattr("sys.argv", ["show", "source=x", f"html={target}"])
    with pytest.raises(SystemExit, match=r"^error: source=x with format=chat needs tokenizer=; give the"):
        show()
    with pytest.raises(SystemExit) as left:
        run(f"source={tmp_path}")
    assert str(left.value.code).endswith("has no effect without html=page.html; add that, or drop it.")
