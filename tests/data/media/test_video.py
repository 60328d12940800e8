"""Videos: sampled frames, timestamps and text equal the reference's; files come back as they were written."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from data.media.process import MediaProcessor, timestamp
from data.media.read import read_video, sample_indices
from model.media import MediaError
from tests.harness.media_reference import TOKENS, frames_reference, merged_reference
from tests.harness.report import report

PROCESSOR = MediaProcessor()


def _frames(count: int, height: int = 120, width: int = 160) -> np.ndarray:
    """A bright bar that moves over a slope: [N, H, W, 3]; its place tells the frame."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = np.linspace(0, 120, width).astype(np.uint8)[:, None]
    for i in range(count):
        frames[i, i * height // count : (i + 1) * height // count + 1] = 230
    return frames


def _write(path: Path, frames: np.ndarray, codec: str, fps: int, options: dict[str, str] | None = None) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for picture in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("num_frames", [1, 8, 32])
def test_sampled_frames_equal_the_reference(num_frames: int) -> None:
    for total in (*range(num_frames, num_frames + 70), 299, 300, 1001, 54_321):
        wanted = default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=num_frames)
        assert sample_indices(total, num_frames) == wanted.tolist()
    for total in range(num_frames):  # the reference refuses videos this short
        assert sample_indices(total, num_frames) == list(range(total))


@pytest.mark.parametrize(("count", "fps"), [(1, 24.0), (7, 1.0), (32, 29.97), (100, 12.5), (40, 0.05), (50, 0.005)])
def test_timestamps_and_text_equal_the_reference(count: int, fps: float) -> None:
    frames = _frames(count, 60, 60)
    item = PROCESSOR.video((frames, fps))
    indices = sample_indices(count, 32)
    metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=indices)
    soft = item.num_tokens // len(indices)
    inputs = {"num_soft_tokens_per_video": [soft], "video_metadata": [metadata]}
    assert item.placeholder == Gemma4Processor.replace_video_token(TOKENS, inputs, 0)
    assert item.num_tokens == item.placeholder.count("<|video|>") == sum(item.lengths) // 9
    assert item.lengths == (9 * soft,) * len(indices)
    assert item.placeholder.startswith(f"00:00 <|image>{'<|video|>' * soft}<image|>")


def test_timestamps_run_past_an_hour() -> None:
    assert [timestamp(s) for s in (0, 59.99, 60, 3599, 3600, 6000.5)] == [
        "00:00", "00:59", "01:00", "59:59", "60:00", "100:00",
    ]  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(240, 320), (200, 90), (33, 700), (720, 1280)])
def test_frames_equal_images_and_nearly_the_reference(height: int, width: int) -> None:
    """Frames are resized as images are. The reference resizes them with another library, in up to 2 of 255 levels."""
    frames = np.random.default_rng(height).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    item = PROCESSOR.video((frames, 1.0))
    images = [MediaProcessor(image_tokens=70).image(frame) for frame in frames]
    assert torch.equal(item.values, torch.cat([image.values for image in images]))
    assert torch.equal(item.positions, torch.cat([image.positions for image in images]))

    columns, rows = (images[0].positions.max(dim=0).values + 1).div(3, rounding_mode="floor").tolist()
    wanted = frames_reference(frames, columns, rows).flatten(0, 1)
    levels = ((item.values - wanted).abs() * 255).round()
    differ = (levels > 0).float().mean().item()
    report(
        "Video frames beside torch's bicubic kernel",
        {"height": height, "width": width, "largest, of 255": int(levels.max()), "differ": f"{differ:.2%}"},
    )
    assert levels.max() <= 2 and differ < 0.02

    merged = MediaProcessor(merged=True).video((frames, 1.0))
    pairs = [merged_reference(image.values, image.positions) for image in images]
    assert torch.equal(merged.values, torch.cat([values for values, _ in pairs]))
    assert torch.equal(merged.positions, torch.cat([positions for _, positions in pairs]))
    assert merged.placeholder == item.placeholder and merged.num_tokens == sum(merged.lengths) == item.num_tokens


@pytest.mark.parametrize(
    ("name", "codec", "fps", "exact"),
    [("a.mkv", "ffv1", 10, True), ("a.mp4", "libx264", 25, False), ("a.webm", "libvpx", 12, False)],
)
@pytest.mark.parametrize("count", [1, 5, 45])
def test_files_give_the_frames_and_times_they_hold(
    tmp_path: Path, name: str, codec: str, fps: int, exact: bool, count: int
) -> None:
    frames = _frames(count)
    _write(tmp_path / name, frames, codec, fps)
    found = read_video(tmp_path / name, 8)[0]
    indices = sample_indices(count, 8)
    assert len(found) == len(indices)
    for (seconds, picture), index in zip(found, indices, strict=True):
        assert seconds == pytest.approx(index / fps)
        difference = np.abs(picture.astype(int) - frames[index])
        assert difference.max() == 0 if exact else difference.mean() < 8
    if exact:
        item = PROCESSOR.video(tmp_path / name)
        assert torch.equal(item.values, PROCESSOR.video((frames, fps)).values)
        assert item.placeholder == PROCESSOR.video((frames, fps)).placeholder


def test_packets_without_a_picture_are_no_frames(tmp_path: Path) -> None:
    """A recording joined midway shows nothing before its second keyframe."""
    _write(tmp_path / "whole.mkv", _frames(60), "libx264", 12, {"g": "20", "bf": "0", "sc_threshold": "0"})
    with av.open(str(tmp_path / "whole.mkv")) as whole, av.open(str(tmp_path / "late.mkv"), "w") as late:
        stream = late.add_stream_from_template(whole.streams.video[0])
        for i, packet in enumerate(whole.demux(video=0)):
            if i and packet.size:
                packet.stream = stream
                late.mux(packet)
    for num_frames in (8, 64):
        seconds = [seconds for seconds, _ in read_video(tmp_path / "late.mkv", num_frames)[0]]
        assert seconds == pytest.approx([index / 12 for index in sample_indices(40, num_frames)])


def test_a_film_held_upright_stays_upright(tmp_path: Path) -> None:
    _write(tmp_path / "a.mp4", _frames(3), "libx264", 5)
    lying = read_video(tmp_path / "a.mp4", 3)[0]
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version, times, track, duration, layer and volume come first
    assert data[matrix : matrix + 4] == (1 << 16).to_bytes(4)
    quarter = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, signed=True) for value in quarter)
    (tmp_path / "b.mp4").write_bytes(data)
    for (_, upright), (_, picture) in zip(read_video(tmp_path / "b.mp4", 3)[0], lying, strict=True):
        assert np.array_equal(upright, np.rot90(picture, -1))


def test_videos_that_cannot_be_used_say_so(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no film at all")
    _write(tmp_path / "whole.mp4", _frames(20), "libx264", 5)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(tmp_path / "sound.wav"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.time_base = 8000, Fraction(1, 8000)
        out.mux(stream.encode(frame))
    frames = _frames(3)
    for source, message in (
        (tmp_path / "no.mp4", r"no\.mp4 is not a file"),
        (tmp_path / "text.mp4", r"text\.mp4 cannot be decoded"),
        (tmp_path / "half.mp4", r"half\.mp4 cannot be decoded"),
        (tmp_path / "sound.wav", r"sound\.wav has no video stream"),
        ((frames[:0], 5), "given video holds no frames"),
        ((frames, 0), "fps=0, from which no timestamp"),
        ((frames.astype(np.float32), 5), "float32"),
        ((frames[0], 5), r"\[120, 160, 3\]; give uint8 \[N, H, W, 3\]"),
    ):
        with pytest.raises(MediaError, match=message) as raised:
            PROCESSOR.video(source)
        assert str(raised.value).count("\n") == 0


def _write_stills(path: Path, width: int, height: int, count: int) -> None:
    """One black frame again and again, in a file of a few kilobytes."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=5)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "monob"
        black = av.VideoFrame(width, height, "monob")
        black.planes[0].update(bytes(black.planes[0].buffer_size))
        [packet] = [*stream.encode(black), *stream.encode(None)]
        for i in range(count):
            copy = av.Packet(bytes(packet))
            copy.stream, copy.pts, copy.dts, copy.time_base = stream, i, i, Fraction(1, 5)
            copy.is_keyframe = True
            out.mux(copy)


def test_videos_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    _write_stills(tmp_path / "huge.mov", 8008, 8000, 1)
    _write_stills(tmp_path / "many.mov", 8000, 8000, 9)
    _write(tmp_path / "wide.mkv", np.zeros((2, 2, 100_000, 3), np.uint8), "ffv1", 5)
    assert (tmp_path / "many.mov").stat().st_size < 1_000_000
    for name, message in (
        ("huge.mov", r"^a frame of .*huge\.mov has more than 64 million pixels; scale it down or leave it out\.$"),
        (
            "many.mov",
            r"many\.mov has more than 512 million pixels in the 9 frames that are taken; scale it down or leave",
        ),
    ):
        with pytest.raises(MediaError, match=message):
            PROCESSOR.video(tmp_path / name)
    wide = PROCESSOR.video(tmp_path / "wide.mkv")
    assert wide.num_tokens == 2 * 70 and (wide.values == 0).all()


def test_what_is_left_out_of_a_film_is_noted(tmp_path: Path) -> None:
    frames = _frames(3)
    _write(tmp_path / "a.mp4", frames, "libx264", 5)
    with av.open(str(tmp_path / "loud.mkv"), "w") as out:
        sound, pictures = out.add_stream("pcm_s16le", rate=8000, layout="mono"), out.add_stream("mpeg4", rate=5)
        assert isinstance(pictures, av.VideoStream) and isinstance(sound, av.AudioStream)
        pictures.height, pictures.width = frames.shape[1:3]
        for picture in frames:
            out.mux(pictures.encode(av.VideoFrame.from_ndarray(picture)))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.time_base = 8000, Fraction(1, 8000)
        for encoded in (pictures.encode(None), sound.encode(frame), sound.encode(None)):
            out.mux(encoded)
    _write(tmp_path / "raw.h264", frames, "libx264", 5)
    notes = {name: PROCESSOR.video(tmp_path / name).notes for name in ("a.mp4", "loud.mkv", "raw.h264")}
    assert notes == {
        "a.mp4": (),
        "loud.mkv": ("the sound of a video, which is not heard",),
        "raw.h264": ("a video without a frame rate, which is guessed",),
    }
    assert PROCESSOR.video((frames, 5)).notes == ()
