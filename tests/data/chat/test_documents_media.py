"""Media of conversations: found, counted, kept in order, and read by the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.batch import IGNORE, collate
from data.corpus.counts import Counts
from data.corpus.dataset import PackedDataset
from data.corpus.open import Settings, Source, open_data
from data.media.files import media_processor
from model import Gemma4, Gemma4Config, UserError
from tests.harness.chat_files import (
    CONFIGS,
    E4B,
    LENGTH,
    TEXT_ONLY,
    TOKENIZER,
    chat,
    make,
    model,
    prepared,
    text,
    user,
    write,
    write_media,
)
from tests.harness.corpus_files import ids_of


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_media(tmp_path)


SKY = {"id": "1", "function": {"name": "sky", "arguments": {}}}
SPELLINGS: list[dict[str, Any]] = [
    {"type": "image", "path": "cat.png"},
    {"type": "image", "url": "cat.png", "text": None},
    {"type": "image", "image": "cat.png", "path": None},
    {"type": "image_url", "image_url": {"url": "cat.png"}},
    {"type": "image_url", "image_url": "cat.png"},
    {"type": "image", "image": {"path": "cat.png", "bytes": None}},
]


@pytest.mark.parametrize("part", SPELLINGS)
def test_each_spelling_of_a_media_part_finds_its_file(part: dict[str, Any], files: Path) -> None:
    corpus = make(
        files, [chat(user(part), model()), chat(user({"type": "image", "path": str(files / "cat.png")}))], E4B
    )
    assert [file.path for file in corpus.shard.document(0).media] == [str(files / "cat.png")]


@pytest.mark.parametrize("name", CONFIGS)
def test_media_come_in_the_order_of_their_tokens_and_the_model_reads_them(name: str, files: Path) -> None:
    config = CONFIGS[name]
    cat, wide = ({"type": "image", "path": f"{name}.png"} for name in ("cat", "wide"))
    film, song = {"type": "video", "video": "film.mp4"}, {"type": "input_audio", "input_audio": {"path": "song.wav"}}
    tool = {"role": "tool", "tool_call_id": "1", "content": [text("See"), wide]}
    lines = [
        chat(
            user(wide, text("and"), song, film), model(), user({"type": "audio", "url": "song.wav"}), model("A song.")
        ),
        chat(user(), model([cat, text("A cat.")], tool_calls=[SKY]), tool),
        chat(user(), model()),
    ]
    corpus = make(files, lines, config, sequence_length=768)
    dataset = PackedDataset(corpus, 768, 0, config)
    assert dataset.sequences_per_epoch == 1
    row, order = dataset[0], [piece.document for piece in dataset.pieces(0)]
    processor = media_processor(config)
    images = {stem: processor.image(files / f"{stem}.png") for stem in ("cat", "wide")}
    clip, video = processor.audio(files / "song.wav"), processor.video(files / "film.mp4")
    frames = list(zip(video.values.split(video.lengths), video.positions.split(video.lengths), strict=True))
    single = {stem: (item.values, item.positions) for stem, item in images.items()}
    # What the tool returned is written before the content of the message that called it.
    wanted = {0: [single["wide"], *frames], 1: [single["wide"], single["cat"]], 2: []}
    expected = [image for i in order for image in wanted[i]]
    assert len(row.images) == len(expected) == 6 and len(row.clips) == 2
    for (values, positions), (wanted_values, wanted_positions) in zip(row.images, expected, strict=True):
        assert torch.equal(values, wanted_values) and torch.equal(positions, wanted_positions)
    assert all(torch.equal(found, clip.values) for found in row.clips)

    tokens = {config.image_token_id, config.video_token_id, config.audio_token_id}
    assert not tokens.intersection(row.labels_S.tolist())
    for i in range(3):
        stored = corpus.shard.document(i)
        for file in stored.media:
            assert sum(token in tokens for token in ids_of(stored)[file.start : file.stop]) == file.num_tokens
    assert [(file.kind, file.num_tokens, file.num_pieces) for file in corpus.shard.document(0).media] == [
        ("image", images["wide"].num_tokens, 1),
        ("audio", clip.num_tokens, 1),
        ("video", video.num_tokens, 3),
        ("audio", clip.num_tokens, 1),
    ]
    batch = collate([row], config)
    network = Gemma4(config)
    network.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = network.run(batch.inputs)
    assert hidden.shape[0] == (row.labels_S != IGNORE).sum() and hidden.isfinite().all()


NO_CALL = {"role": "tool", "content": [{"type": "image", "path": "cat.png"}]}
REFUSED: dict[str, tuple[Any, Gemma4Config, str]] = {
    "address": ({"type": "image", "url": "https://x.y/cat.png"}, E4B, "https://x.y/cat.png is not a local file; save"),
    "inline": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, E4B, "data:.* is not a local"),
    "base64": (
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        E4B,
        "input_audio names no file",
    ),
    "nothing": ({"type": "image"}, E4B, "of type image names no file; give its path"),
    "gone": ({"type": "image", "path": "dog.png"}, E4B, r"dog\.png is not a file"),
    "no picture": ({"type": "image", "path": "song.wav"}, E4B, r"song\.wav cannot be read as an image"),
    "blind": (
        {"type": "image", "path": "cat.png"},
        TEXT_ONLY,
        r"the image .*cat\.png; set model\.vision=freeze \(or tr",
    ),
    "blind to films": ({"type": "video", "path": "film.mp4"}, TEXT_ONLY, r"the video .*model\.vision=freeze"),
    "deaf": ({"type": "audio", "path": "song.wav"}, E4B.replace(audio=None), r"the audio .*; set model\.audio=freeze"),
    "typed": (text("see <|image|>"), E4B, r"spells the media token <\|image\|>"),
    "surrogate": ({"text": "half \ud800"}, E4B, "half a surrogate pair"),
    "system": ([{"role": "system", "content": [{"type": "image"}]}, user()], E4B, "leaves out 1 of 1 media parts"),
    "no call": ([user(), model(), NO_CALL], E4B, r"messages\[2\] answers no call and would be lost"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_line(case: str, files: Path) -> None:
    given, config, message = REFUSED[case]
    line = chat(*given) if isinstance(given, list) else chat(user(given), model()) if "type" in given else given
    with pytest.raises(UserError, match=rf"chats\.jsonl:2: .*{message}") as raised:
        make(files, [chat(user(), model()), line], config)
    assert "\n" not in str(raised.value) and not list((files / "cache" / "corpora").iterdir())


def test_a_media_file_that_changed_or_is_gone_is_named(files: Path) -> None:
    def dataset(name: str, kind: str) -> PackedDataset:
        line = chat(user({"type": kind, "path": name}), model())
        return PackedDataset(make(files, [line], E4B), LENGTH, 0, E4B)

    pictures, films = dataset("cat.png", "image"), dataset("film.mp4", "video")
    Image.new("RGB", (120, 90)).save(files / "cat.png")  # of the same size
    (files / "film.mp4").write_bytes((files / "song.wav").read_bytes())
    for broken, message in (
        (pictures, r"cat\.png changed .*delete .*corpora"),
        (films, r"film\.mp4 changed .*delete .*corpora"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            broken[0]
        assert "\n" not in str(raised.value)
    (files / "cat.png").unlink()
    with pytest.raises(UserError, match=r"cat\.png is not a file"):
        pictures[0]


def test_a_budget_of_media_bounds_each_row_and_each_conversation(files: Path) -> None:
    cat, wide = ({"type": "image", "path": name} for name in ("cat.png", "wide.png"))
    both = chat(user(cat), model(), user(wide), model("A bird."))
    lines = [chat(user(cat), model()), chat(user(wide), model()), both, chat(user(cat, wide), model())]
    free = make(files, lines, E4B)
    cats, wides = (int(free.shard.soft_tokens[i]) for i in (0, 1))
    assert free.shard.soft_tokens.tolist() == [cats, wides, cats + wides, cats + wides] and cats + wides > 70
    assert PackedDataset(free, LENGTH, 0, E4B).sequences_per_epoch == 1

    cut = prepared(files, E4B, max_media_tokens=70)
    assert cut.shard.counts == Counts(kept=3, cut=1, too_many_media=1, shapes={"messages": 4})
    assert cut.shard.soft_tokens.tolist() == [cats, wides, cats] and len(cut.shard.document(2).media) == 1
    assert ids_of(cut.shard.document(2)) == ids_of(cut.shard.document(0))
    dataset = PackedDataset(cut, LENGTH, 0, E4B)
    assert [len(dataset[i].images) for i in range(3)] == [1, 1, 1] and dataset.sequences_per_epoch == 3
    packed = f"packing with at most 70 soft tokens of media in a sequence leaves {dataset.packing.padding:.1%} empty"
    assert str(dataset).endswith(f"1 cut; left out: 1 with too many media | {packed}")

    dropped = prepared(files, E4B, max_media_tokens=70, on_long="drop")
    assert dropped.shard.counts == Counts(kept=2, too_many_media=2, shapes={"messages": 4})
    with pytest.raises(UserError, match=rf"chats.jsonl:3 has {cats + wides} soft tokens .*data.max_media_tokens=70"):
        prepared(files, E4B, max_media_tokens=70, on_long="refuse")
    assert len({free.folder, cut.folder, dropped.folder}) == 3


def test_a_run_knows_another_budget_as_other_data(files: Path) -> None:
    write(files, [chat(user({"type": "image", "path": name}), model()) for name in ("cat.png", "wide.png")])
    TOKENIZER.save(str(files / "tokenizer.json"))
    source = Source(str(files / "chats.jsonl"), 1, "chat")
    free = Settings(E4B, LENGTH, 0, files / "tokenizer.json", cache=files / "cache")
    first, second = (open_data([source], replace(free, max_media_tokens=most)) for most in (None, 80))
    assert second.keys == [f"{first.keys[0]} with 80 of media"] and second.sequences_per_epoch == 2
