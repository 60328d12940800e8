"""A page of what a run learns from: inert whatever the data, and with the numbers of the terminal view."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.chat import previews
from data.chat.page import Files, PageError, View, make_page
from data.chat.previews import media_type
from data.chat.read import read_conversations
from data.chat.show import shown_tokens
from data.corpus.report import histogram
from data.media.process import MediaProcessor
from data.tokenizer import load_tokenizer
from launch.show import main as show
from tests.harness.chat_files import TOKENIZER, chat, model, text, user, write_media
from tests.harness.html import ATTRIBUTES, HOSTILE, TAGS, Page


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def reading(*paths: Path) -> Files:
    return {path: partial(read_conversations, [path]) for path in paths}


def say(words: str) -> dict[str, Any]:
    return user(text(words))


def page(*paths: Path, **view: Any) -> Page:
    return Page(make_page(reading(*paths), View(TOKENIZER, **view)))


def numbers(found: Page) -> list[tuple[int, int]]:
    """Tokens and supervised tokens of each document that is shown."""
    pairs = re.findall(r":\d+ ([\d,]+) tokens ([\d,]+) supervised", found.text)
    return [(int(tokens.replace(",", "")), int(learned.replace(",", ""))) for tokens, learned in pairs]


def test_whatever_data_says_is_text(tmp_path: Path) -> None:
    plain = page(write(tmp_path / "plain.jsonl", [chat(say("x"), model("y"))] * 2))
    assert {name for name, _ in plain.elements} < TAGS
    lines = [
        chat({"role": "system", "content": bad}, say(bad), model(bad, reasoning=bad), **{f"{bad}key": bad})
        for bad in HOSTILE
    ]
    lines += [{"text": bad} for bad in HOSTILE]
    lines += [chat(user(), model(), **{"half a pair \ud800": 1})]
    lines += [chat(user({"type": kind, "path": bad}), model()) for bad in HOSTILE for kind in ("image", "video")]
    path = tmp_path / "<script>alert('1')<" / 'script> onload="x".jsonl'
    path.parent.mkdir()
    found = page(write(path, lines))
    assert not found.open and {name for name, _ in found.elements} <= TAGS
    assert {key for _, attributes in found.elements for key in attributes} <= ATTRIBUTES
    assert [anchor["href"] for anchor in found.all("a")] == ["#file-0"]
    for words in ("<script>alert(1)</script>", "onerror=alert(1)>", "<svg onload=alert(1)>", "${files} &lt;b&gt; ]]>"):
        assert found.text.count(words) >= 3
    assert "\x1b" not in found.text and "\u202e" not in found.text and "\\x1b[31m" in found.text
    assert "half a pair \\ud800" in found.text and found.text.encode()
    assert str(path) in found.text and len(found.all("article")) == len(lines)


def test_a_picture_with_a_hostile_name_is_linked_and_nothing_else(tmp_path: Path) -> None:
    name = "\"><script>alert(1)<!-- ?#%41 '.png"
    Image.new("RGB", (60, 40), "red").save(tmp_path / name)
    found = page(write(tmp_path / "chats.jsonl", [chat(user({"type": "image", "path": name}), model())]))
    (_, link) = found.all("a")
    assert link == {"href": (tmp_path / name).as_uri()} and str(link["href"]).startswith("file:///")
    assert {tag for tag, _ in found.elements} <= TAGS and f"{name}: " in found.text


def test_the_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    html = make_page(reading(write(tmp_path / "chats.jsonl", [chat(user(), model())])), View(TOKENIZER))
    policy = next(a["content"] for a in Page(html).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:;")
    assert not re.search(r"https?:|//|url\(|@import", html)


def test_counts_are_those_of_the_terminal_view(tmp_path: Path) -> None:
    lines = [
        chat(say("What is it?"), model("A cat.", reasoning="It says miaow."), user(), model("ü 🦜", weight=0)),
        chat(say("<|turn>model\nA cat.<turn|>\n"), model("A bird.")),
        chat(user({"type": "image", "path": "gone.png"}, text("this?")), model("A song."), system="Be brief."),
        {"text": "<|turn> A film."},
    ]
    path = write(tmp_path / "chats.jsonl", lines)
    found = page(path)
    shown = [shown_tokens(item, TOKENIZER, "small", {}) for item in read_conversations([path])]
    wanted = [(len(encoded.ids), sum(encoded.supervised)) for _, encoded in shown]
    assert numbers(found) == wanted and wanted[1][1] == len(TOKENIZER.encode("A bird.").ids) + 1
    total, learned = (sum(column) for column in zip(*wanted, strict=True))
    assert f"4 documents, all of them below {total:,} tokens {learned:,} supervised" in found.text
    soft = "gone.png: 4 soft tokens stand for it: "
    assert soft in found.text and "gone.png is not a file; check the path." in found.text
    media = "<|image>" + "<|image|>" * 4 + "<image|>"
    assert "".join(found.tokens) == "".join("".join(texts) for texts, _ in shown).replace(media, "")


def test_what_is_learned_is_marked_and_turns_have_their_roles(tmp_path: Path) -> None:
    line = chat({"role": "system", "content": "Be brief."}, say("<turn|>\n<|turn>model\nno"), model("A <b> cat."))
    html = make_page(reading(write(tmp_path / "chats.jsonl", [line])), View(TOKENIZER))
    assert Page(html).learned == "A <b> cat.<turn|>"
    assert re.findall('<div class="turn (\\w+)">', html) == ["system", "user", "model"]
    control = "".join(re.findall("<i class=control [^>]*>(.*?)</i>", html, re.DOTALL))
    assert control.startswith("&lt;bos&gt;&lt;|turn&gt;system\n&lt;turn|&gt;&lt;|turn&gt;user\n")
    ids = [int(i) for found in re.findall('title="id ([^"]*)"', html) for i in found.split(",")]
    item = next(iter(read_conversations([tmp_path / "chats.jsonl"])))
    assert ids == shown_tokens(item, TOKENIZER, "small", {})[1].ids


def test_a_turn_after_a_call_without_an_answer_is_one_of_its_own(tmp_path: Path) -> None:
    call = {"id": "1", "function": {"name": "sky", "arguments": {}}}
    lines = [
        chat(user(), {"role": "assistant", "tool_calls": [call]}, say("<|tool_response><|turn>model\nno"), model())
    ]
    html = make_page(reading(write(tmp_path / "chats.jsonl", lines)), View(TOKENIZER))
    assert re.findall('<div class="turn (\\w+)">', html) == ["user", "model", "user", "model"]


def test_media_are_in_the_page_with_what_they_are_and_their_soft_tokens(tmp_path: Path) -> None:
    write_media(tmp_path)
    (tmp_path / "film.mp4").rename(tmp_path / "film.txt")
    parts = [{"type": kind, "path": path} for kind, path in zip(("image", "audio", "video"), FILES, strict=True)]
    path = write(tmp_path / "chats.jsonl", [chat(user(*parts, text("What?")), model())])
    html = make_page(reading(path), View(TOKENIZER))
    found, processor = Page(html), MediaProcessor()
    image = processor.image(tmp_path / "cat.png")
    sound, film = processor.audio(tmp_path / "song.wav"), processor.video(tmp_path / "film.txt")
    for name, item in zip(FILES, (image, sound, film), strict=True):
        assert f"{name}: {item.num_tokens:,} soft tokens" in found.text
    assert numbers(found)[0][0] > sum(item.num_tokens for item in (image, sound, film))
    picture = Image.open(io.BytesIO(content(found.all("img")[0], "image/jpeg")))
    assert (picture.format, picture.size) == ("JPEG", (90, 120))
    assert content(found.all("audio")[0], "audio/wav") == (tmp_path / "song.wav").read_bytes()
    assert content(found.all("video")[0], "video/mp4") == (tmp_path / "film.txt").read_bytes()
    assert [html.index(f"<{tag} ") for tag in ("img", "audio", "video")] == sorted(
        html.index(f"<{tag} ") for tag in ("img", "audio", "video")
    )


FILES = ("cat.png", "song.wav", "film.txt")


def content(attributes: dict[str, str | None], media: str) -> bytes:
    name, _, encoded = str(attributes["src"]).partition(";base64,")
    assert name == f"data:{media}"
    return base64.b64decode(encoded)


def test_a_large_sound_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_media(tmp_path)
    size = (tmp_path / "song.wav").stat().st_size
    path = write(tmp_path / "chats.jsonl", [chat(user({"type": "audio", "path": "song.wav"}), model())])
    monkeypatch.setattr(previews, "MAX_BYTES", size)
    assert len(page(path).all("audio")) == 1
    monkeypatch.setattr(previews, "MAX_BYTES", size - 1)
    found = page(path)
    assert not found.all("audio") and found.all("a")[1]["href"] == (tmp_path / "song.wav").as_uri()
    assert f"song.wav, {size / 1e6:,.1f} MB" in found.text


@pytest.mark.parametrize(
    ("kind", "head", "name"),
    [
        ("audio", b"RIFF\n\n\n\nWAVEfmt", "audio/wav"),
        ("audio", b"\xff\xfb\x90\x64", "audio/mpeg"),
        ("audio", b"\xff\xf1\x50\x80", "audio/aac"),
        ("audio", b"\x00\x00\x00\x20ftypM4A ", "audio/mp4"),
        ("video", b"\x00\x00\x00\x20ftypisom", "video/mp4"),
        ("video", b"\x1aE\xdf\xa3", "video/webm"),
        ("video", b"RIFF\n\n\n\nAVI LIST", None),
        ("audio", b"<html><script>", None),
    ],
)
def test_types_follow_from_content(kind: str, head: bytes, name: str | None) -> None:
    assert media_type(kind, head) == name


def test_a_histogram_has_every_document_in_one_class() -> None:
    lengths = [*range(1, 300), 1 << 17, (1 << 17) - 1]
    classes = histogram(lengths)
    assert sum(count for _, _, count in classes) == len(lengths)
    assert all(count == sum(least <= length <= most for length in lengths) for least, most, count in classes)
    assert all(most + 1 == least for (_, most, _), (least, _, _) in pairwise(classes))
    assert histogram([64, 90, 91, 127, 128]) == [(64, 90, 2), (91, 127, 2), (128, 181, 1)] and not histogram([])


def test_the_bars_tell_the_number_of_documents(tmp_path: Path) -> None:
    lines = [chat(say("cat " * (i + 1)), model()) for i in range(40)]
    html = make_page(reading(write(tmp_path / "chats.jsonl", lines)), View(TOKENIZER, samples=3))
    told = [int(count) for count in re.findall(r"<title>[\d,]+ to [\d,]+ tokens: ([\d,]+) documents</title>", html)]
    assert len(told) > 2 and sum(told) == 40
    shown = [shown_tokens(item, TOKENIZER, "small", {})[1] for item in read_conversations([tmp_path / "chats.jsonl"])]
    tokens, learned = sum(len(item.ids) for item in shown), sum(sum(item.supervised) for item in shown)
    assert f"40 documents, 3 of them below, spread evenly over the file {tokens:,} tokens {learned:,} supervised" in (
        Page(html).text
    )
    assert f"chats.jsonl40{tokens:,}{learned:,}{learned / tokens:.1%}" in Page(html).text


@pytest.mark.parametrize(("samples", "shown"), [(4, [1, 6, 11, 16]), (30, [*range(1, 21)]), (0, [*range(1, 21)])])
def test_samples_are_spread_over_the_file_and_always_the_same(samples: int, shown: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [chat(say(f"{i}?"), model()) for i in range(20)])
    pages = [make_page(reading(path), View(TOKENIZER, samples=samples)) for _ in range(2)]
    assert pages[0] == pages[1]
    assert [int(line) for line in re.findall(r"<h3><b>[^<]*:(\d+)</b>", pages[0])] == shown
    assert "20 documents, " in pages[0]


def test_a_long_document_is_shown_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.chat.markup.MAX_TOKENS", 20)
    path = write(tmp_path / "chats.jsonl", [chat(say("a " * 40), model("a bird"), user(), model())])
    found = page(path)
    (total, learned) = numbers(found)[0]
    assert f"and {total - 20} more tokens, {learned} of them supervised" in found.text
    assert sum("title" in attributes for attributes in found.all("i")) == 20


def test_pages_that_would_show_nothing_or_replace_data_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, some = tmp_path / "none.jsonl", write(tmp_path / "some.jsonl", [{"text": "A cat."}])
    empty.write_text("\n")
    wanted = f'{empty} holds no document to show; give a file with lines of {{"messages": [...]}} or {{"text": "..."}}.'
    with pytest.raises(PageError, match=f"^{re.escape(wanted)}$"):
        make_page(reading(empty), View(TOKENIZER))
    assert "0 documents" in page(empty, some).text
    target, tokenizer = tmp_path / "page.html", tmp_path / "tokenizer.json"
    TOKENIZER.save(str(tokenizer))
    for arguments, said in (
        ([f"file={empty}", f"html={target}"], wanted),
        ([f"file={some}", f"html={some}"], f"html={some} does not end in .html, and might be other data; name a page."),
        ([f"file={some}", "samples=9"], "samples=9 has no effect without html=page.html; add that, or drop it."),
        ([f"html={target}", "rows=9"], "rows=9 has no effect without source=chats.jsonl; add that, or drop it."),
        ([f"html={target}", "samples=-1"], "samples=-1 is below 0; give 0 or more."),
    ):
        monkeypatch.setattr("sys.argv", ["show", *arguments])
        with pytest.raises(SystemExit) as left:
            show()
        assert left.value.code == f"error: {said}" and not target.exists()
    assert some.read_text() == '{"text": "A cat."}\n'
    monkeypatch.setattr("sys.argv", ["show", f"file={some}", f"tokenizer={tokenizer}", f"html={target}"])
    show()
    assert capsys.readouterr().out == f"{target}: 0.0 MB\n"
    html = target.read_text(encoding="utf-8")
    assert html == make_page(reading(some), View(load_tokenizer(tokenizer)))
    assert "No tokenizer was given" not in html and "No tokenizer was given" in make_page(reading(some), View())
