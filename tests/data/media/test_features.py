"""Processed media that are kept on disk: the same bits, whatever happens to the files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.batch import Batch
from data.corpus.dataset import PackedDataset
from data.loader import BatchLoader, StepSampler
from data.media.features import FeatureCache
from data.media.files import digest, media_processor
from data.media.process import MediaItem, MediaProcessor
from model import UserError
from tests.harness.chat_files import CONFIGS, E4B, LENGTH, chat, make, model, user, write_media

FILES = {"image": "cat.png", "audio": "song.wav", "video": "film.mp4"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_media(tmp_path)


def same(one: MediaItem, other: MediaItem) -> bool:
    bits = all(
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in ((one.values, other.values), (one.positions, other.positions))
    )
    nothing = torch.zeros(0)
    return bits and vars(replace(one, values=nothing, positions=nothing)) == vars(
        replace(other, values=nothing, positions=nothing)
    )


def reader(kind: str, path: Path, processor: MediaProcessor) -> Callable[[], MediaItem]:
    return lambda: getattr(processor, kind)(path)


def never() -> MediaItem:
    raise AssertionError("it is kept already")


def test_what_is_kept_is_every_bit_of_what_was_made(files: Path) -> None:
    cache, total = FeatureCache(files / "features"), 0
    for config in CONFIGS.values():
        for kind, name in FILES.items():
            processor, sha256 = media_processor(config), digest(files / name)
            made = cache.item(kind, sha256, processor, reader(kind, files / name, processor))
            found = cache.item(kind, sha256, processor, never)
            assert found is not made
            assert same(found, made) and same(made, reader(kind, files / name, processor)())
            values = made.values.numel() * (4 if kind == "audio" else 1)
            total += values + 4 * len(made.positions) + 9 * len(made.placeholder)
    count, size = cache.size()
    assert count == 6 and size < total + 6 * 1000, "a byte for each number of a pixel; other settings, other files"
    finer, path = replace(media_processor(E4B), image_tokens=140), files / "cat.png"
    assert cache.item("image", digest(path), finer, reader("image", path, finer)).num_tokens > 70


def test_a_damaged_one_is_made_anew(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    processor, sha256 = media_processor(E4B), digest(files / "song.wav")
    cache, make_it = FeatureCache(files / "features"), reader("audio", files / "song.wav", media_processor(E4B))
    made = cache.item("audio", sha256, processor, make_it)
    (kept,) = (files / "features").glob("*/*.features")
    whole = kept.read_bytes()
    damages = [whole[:-1], whole[: len(whole) // 2], b"", whole + b"x"]
    damages += [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 9, 50, len(whole) // 2, -5 % len(whole))
    ]
    with caplog.at_level(logging.WARNING, "gemwright"):
        for damaged in damages:
            kept.write_bytes(damaged)
            assert same(cache.item("audio", sha256, processor, make_it), made) and kept.read_bytes() == whole
    assert len(caplog.messages) == len(damages) and all("is damaged (" in message for message in caplog.messages)
    assert same(cache.item("audio", sha256, processor, never), made)


def test_many_may_write_at_once_and_a_place_that_cannot_be_written_costs_time_only(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor, sha256 = media_processor(E4B), digest(files / "cat.png")
    cache, make_it = FeatureCache(files / "features"), reader("image", files / "cat.png", processor)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: cache.item("image", sha256, processor, make_it), range(8))]
    assert all(same(item, found[0]) for item in found)
    assert [path.suffix for path in (files / "features").glob("*/*")] == [".features"]
    (files / "full").touch()
    with caplog.at_level(logging.WARNING, "gemwright"):
        for _ in range(2):
            assert same(FeatureCache(files / "full").item("image", sha256, processor, make_it), found[0])
    assert "features of media cannot be kept in" in caplog.text and caplog.text.count("cannot be kept") == 1


def test_rows_and_batches_are_the_same_with_a_cache_and_a_changed_file_is_still_named(files: Path) -> None:
    lines = [chat(user({"type": kind, "path": name}), model()) for kind, name in FILES.items()]
    corpus = make(files, lines, E4B)
    cache = FeatureCache(files / "cache" / "features")
    plain, kept = PackedDataset(corpus, LENGTH, 0, E4B), PackedDataset(corpus, LENGTH, 0, E4B, features=cache)

    def batches(dataset: PackedDataset, workers: int) -> list[Batch]:
        return [*BatchLoader(dataset, StepSampler(0, 2, 2, 1, 0, 1), workers, E4B)]

    wanted = batches(plain, 0)
    for workers in (2, 0):
        for found, right in zip(batches(kept, workers), wanted, strict=True):
            media, other = found.inputs.media, right.inputs.media
            assert media and media.vision and media.audio and other and other.vision and other.audio
            assert torch.equal(media.vision.values_TC, other.vision.values_TC)
            assert torch.equal(media.vision.positions_T2, other.vision.positions_T2)
            assert torch.equal(media.audio.values_TF, other.audio.values_TF)
    assert cache.size()[0] == 3
    (files / "song.wav").write_bytes((files / "cat.png").read_bytes())
    with pytest.raises(UserError, match=r"song\.wav changed since it was prepared"):
        kept[0]
    (files / "song.wav").unlink()
    with pytest.raises(UserError, match=r"song\.wav is not a file"):
        kept[0]
