"""Images: patches, positions and text equal the reference's; every kind of file becomes upright RGB."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from data.media.images import BUDGETS, fit
from data.media.process import MediaProcessor
from data.media.read import read_image
from model.media import MediaError
from tests.harness.media_reference import image_reference, merged_reference
from tests.harness.report import report

SIZES = (
    (640, 480),
    (480, 640),
    (333, 777),
    (800, 801),
    (1, 1),
    (3, 2),
    (47, 49),
    (48, 48),
    (960, 672),
    (672, 960),
    (500, 25),
    (25, 500),
    (1200, 3),
    (3, 1200),
    (3000, 2),
    (1, 2999),
    (20_000, 1),
    (1000, 97),
    (97, 1000),
    (1920, 1080),
    (17, 1000),
    (1023, 767),
)
"""(width, height), from square to a line."""


def _picture(width: int, height: int) -> Image.Image:
    """Slopes with noise on top, so that a wrong filter, order or axis shows."""
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([255 * x / width, 255 * y / height, (x * 7 + y * 3) % 256], axis=-1)
    noise = np.random.default_rng(width * 31 + height).integers(-40, 40, slopes.shape)
    return Image.fromarray(np.clip(slopes + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("budget", BUDGETS)
def test_sizes_equal_the_reference(budget: int) -> None:
    generator = random.Random(budget)
    drawn = [(generator.randint(1, 10 ** generator.randint(1, 5)), generator.randint(1, 5000)) for _ in range(4000)]
    whole = [(48 * a * k, 48 * b * k) for a in range(1, 30) for b in range(1, 30) for k in (1, 3)]
    lines = [(budget * k + more, k) for k in range(1, 60) for more in (-1, 0, 1)]
    for width, height in [*drawn, *whole, *lines, *(line[::-1] for line in lines)]:
        rows, columns = get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
        assert fit(width, height, budget, 48) == (columns // 48, rows // 48), (width, height)


@pytest.mark.parametrize("budget", BUDGETS)
def test_patches_positions_and_text_equal_the_reference(budget: int) -> None:
    sizes = SIZES if budget <= 280 else SIZES[:4]
    plain, merged = MediaProcessor(image_tokens=budget), MediaProcessor(image_tokens=budget, merged=True)
    worst = 0.0
    for size in sizes:
        picture = _picture(*size)
        values, positions, text = image_reference(picture, budget)
        item = plain.image(picture)
        assert item.values.dtype == torch.float32 and item.positions.dtype == torch.int64
        assert torch.equal(item.positions, positions) and item.lengths == (len(values),), size
        assert item.placeholder == text and item.num_tokens == text.count("<|image|>") <= budget, size
        worst = max(worst, (item.values - values).abs().max().item())

        values, positions = merged_reference(values, positions)
        item = merged.image(picture)
        assert item.values.shape == (len(text) // len("<|image|>") - 1, 6912) and item.placeholder == text, size
        assert torch.equal(item.positions, positions) and item.num_tokens == len(values), size
        worst = max(worst, (item.values - values).abs().max().item())
    name = f"image and 12B image, {budget} tokens"
    report("Media equal to transformers", {"what": name, "items": len(sizes), "max |difference|": f"{worst:.1e}"})
    assert worst < 1e-5


def _modes() -> dict[str, Image.Image]:
    rgb = _picture(150, 110)
    alpha = Image.fromarray(np.tile(np.arange(150, dtype=np.uint8), (110, 1)))
    rgba, grey_alpha = rgb.copy(), rgb.convert("L")
    rgba.putalpha(alpha)
    grey_alpha.putalpha(alpha)
    palette = rgb.quantize(64)
    clear = palette.copy()
    clear.info["transparency"] = 5
    modes = {"RGBA": rgba, "LA": grey_alpha, "P": palette, "P with a clear colour": clear}
    return modes | {mode: rgb.convert(mode) for mode in ("L", "1", "CMYK", "YCbCr", "HSV")}


@pytest.mark.parametrize("mode", _modes())
def test_every_mode_becomes_the_reference_s_rgb(mode: str) -> None:
    picture = _modes()[mode]
    values, _, _ = image_reference(picture, 70)
    assert torch.equal(MediaProcessor(image_tokens=70).image(picture).values, values)


def test_transparent_is_white() -> None:
    clear = np.zeros((60, 60, 4), np.uint8)
    assert np.asarray(read_image(clear)[0]).min() == 255
    assert (MediaProcessor().image(clear).values == 1).all()


@pytest.mark.parametrize("shape", [(90, 120), (90, 120, 3), (90, 120, 4)])
def test_arrays_are_images(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    item, same = MediaProcessor().image(array), MediaProcessor().image(Image.fromarray(array))
    assert torch.equal(item.values, same.values)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_files_give_what_their_pixels_give(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    _picture(300, 200).save(path)
    wanted = MediaProcessor().image(Image.open(path).convert("RGB"))
    for source in (path, str(path)):
        assert torch.equal(MediaProcessor().image(source).values, wanted.values)
    if suffix in ("png", "bmp", "tiff"):
        assert torch.equal(wanted.values, MediaProcessor().image(_picture(300, 200)).values)


@pytest.mark.parametrize(
    ("orientation", "turns"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (1, None)]
)
def test_photos_are_turned_upright(tmp_path: Path, orientation: int, turns: Image.Transpose | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    _picture(300, 200).save(tmp_path / "a.png", exif=exif)
    upright = _picture(300, 200) if turns is None else _picture(300, 200).transpose(turns)
    for source in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(read_image(source)[0]), np.asarray(upright))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_several_pictures_the_first_is_taken_and_that_is_noted(tmp_path: Path, suffix: str) -> None:
    first, second = _picture(90, 60), Image.new("RGB", (90, 60))
    first.save(tmp_path / f"several.{suffix}", save_all=True, append_images=[second], lossless=True)
    first.save(tmp_path / f"one.{suffix}", lossless=True)
    several, one = (MediaProcessor().image(tmp_path / f"{name}.{suffix}") for name in ("several", "one"))
    assert torch.equal(several.values, one.values) and one.notes == ()
    assert several.notes == ("an animated picture or one of several pages, of which the first is taken",)
    with Image.open(tmp_path / f"several.{suffix}") as opened:
        assert MediaProcessor().image(opened).notes == several.notes


def test_previews_in_a_photo_are_no_pictures_of_their_own(tmp_path: Path) -> None:
    _picture(90, 60).save(tmp_path / "a.mpo", save_all=True, append_images=[_picture(30, 20)])
    with Image.open(tmp_path / "a.mpo") as opened:
        assert opened.format == "MPO" and getattr(opened, "n_frames", 1) == 2
    assert MediaProcessor().image(tmp_path / "a.mpo").notes == ()


def _png(width: int, height: int) -> bytes:
    """A file of a header, and no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.filterwarnings("error")
def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """Most are headers without pixels; Pillow would pass the first, warn of the second, and fail at the third."""
    for side in (8001, 13_000, 50_000):
        (tmp_path / f"{side}.png").write_bytes(_png(side, side))
    (tmp_path / "wide.gif").write_bytes(
        b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + bytes(9) + b"\x08"
    )
    Image.new("1", (8001, 8000)).save(tmp_path / "huge.tiff", compression="group4")
    assert (tmp_path / "huge.tiff").stat().st_size < 100_000
    for name in ("8001.png", "13000.png", "50000.png", "wide.gif", "huge.tiff"):
        with pytest.raises(MediaError) as raised:
            MediaProcessor().image(tmp_path / name)
        assert str(raised.value) == f"{tmp_path / name} has more than 64 million pixels; scale it down or leave it out."
    (tmp_path / "fine.png").write_bytes(_png(8000, 8000))
    with pytest.raises(MediaError, match="cannot be read as an image"):
        MediaProcessor().image(tmp_path / "fine.png")


def test_a_program_is_no_picture(tmp_path: Path) -> None:
    """Pillow would have another program run it."""
    Image.new("RGB", (60, 60)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"a\.png cannot be read as an image \(cannot identify image file"):
        MediaProcessor().image(tmp_path / "a.png")


def test_images_that_cannot_be_used_say_so(tmp_path: Path) -> None:
    _picture(300, 200).save(tmp_path / "whole.png")
    _picture(300, 200).save(tmp_path / "whole.jpg")
    for suffix in ("png", "jpg"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"half.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    for source, message in (
        (tmp_path / "no.png", r"no\.png is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "text.png", r"text\.png cannot be read as an image \(cannot identify"),
        (tmp_path / "empty.jpg", r"empty\.jpg cannot be read as an image"),
        (tmp_path / "half.png", r"half\.png cannot be read as an image \(.*truncated"),
        (tmp_path / "half.jpg", r"half\.jpg cannot be read as an image \(.*truncated"),
        (tmp_path / "deep.png", r"deep\.png has pixels of mode I;16"),
        (np.zeros((9, 9, 3), np.float32), r"float32 \[9, 9, 3\]; give uint8 \[H, W\]"),
        (np.zeros((3, 9, 9), np.uint8), r"\[3, 9, 9\]"),
        (np.zeros((9, 0, 3), np.uint8), r"\[9, 0, 3\]"),
        (np.zeros(9, np.uint8), r"\[9\]"),
    ):
        with pytest.raises(MediaError, match=message) as raised:
            MediaProcessor().image(source)
        assert str(raised.value).count("\n") == 0
