"""Media files, or arrays in their place, made into RGB images, 16 kHz mono waveforms and sampled video frames.

What is left out of a file is told in notes: a few words without numbers, so that they can be counted over many files.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from PIL import Image, ImageOps

from model.media import MediaError

ImageSource: TypeAlias = str | Path | Image.Image | np.ndarray
AudioSource: TypeAlias = str | Path | tuple[np.ndarray, int]
VideoSource: TypeAlias = str | Path | tuple[np.ndarray, float]

SAMPLING_RATE = 16_000
MAX_SAMPLES = 30 * SAMPLING_RATE
"""Gemma 4 hears 30 seconds; what follows is cut."""
_PADDING = SAMPLING_RATE // 10
"""Encoders of mp3 and the like fill up their last frame; less than this after 30 seconds counts as no cut."""
FALLBACK_FPS = 24.0
"""For a video whose file states no frame rate."""
MAX_PIXELS = 64_000_000
"""In a picture or a frame; a small file can hold far more."""
MAX_VIDEO_PIXELS = 8 * MAX_PIXELS
"""In all frames that are taken of one video, which are in memory at once."""
_NO_TIMESTAMPS = 0x80
"""AVFMT_NOTIMESTAMPS among ffmpeg's flags of a format."""
CUT_SOUND = "sound cut after 30 s"
FIRST_FRAME = "an animated picture or one of several pages, of which the first is taken"
GUESSED_RATE = "a video without a frame rate, which is guessed"
FURTHER_STREAMS = "further streams of one kind, of which the first is taken"
SILENT_FILM = "the sound of a video, which is not heard"


def read_image(source: ImageSource) -> tuple[Image.Image, tuple[str, ...]]:
    """8-bit RGB, turned upright by its EXIF orientation, transparency laid over white; and notes.

    `source` is a path, a PIL image or a uint8 array [H, W], [H, W, 3] or [H, W, 4]; of an animation the first frame
    is taken. The reference does the same but for two gaps: its file loader drops transparency instead, and it leaves
    a PIL image as its camera held it. Raises `MediaError` for a file that is missing, damaged or no image, for pixels
    of more than 8 bits, and for more than `MAX_PIXELS`, before they are decoded.
    """
    name = source_name(source, "image")
    try:
        if isinstance(source, np.ndarray):
            legal = source.ndim > 1 and source.shape[2:] in ((), (3,), (4,))
            return _rgb(Image.fromarray(_checked_pixels(source, legal, "[H, W], [H, W, 3] or [H, W, 4]")), name), ()
        if isinstance(source, Image.Image):
            return _rgb(source, name), _first_of_many(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_existing(source), formats=_formats()) as image:
                return _rgb(image, name), _first_of_many(image)
    except MediaError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_many_pixels(name) from None
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        raise MediaError(f"{name} cannot be read as an image ({error}); give a whole image file.") from None


def read_audio(source: AudioSource) -> tuple[np.ndarray, tuple[str, ...]]:
    """Mono float32 waveform [samples] at 16 kHz, at most 30 seconds; and notes.

    `source` is a path, or (float array [samples], sampling rate in Hz), which at 16 kHz is passed on untouched.
    Channels are averaged. Raises `MediaError` for a file that is missing, damaged or without sound.
    """
    name = source_name(source, "waveform")
    notes: tuple[str, ...] = ()
    if isinstance(source, tuple):
        waveform = _checked_waveform(*source)
        if source[1] != SAMPLING_RATE:
            waveform = resample([_audio_frame(waveform, source[1])])
    else:
        with _opened(source) as container:
            if not container.streams.audio:
                raise MediaError(f"{name} has no audio stream; give a file with sound.")
            notes = (FURTHER_STREAMS,) * (len(container.streams.audio) > 1)
            waveform = resample(container.decode(audio=0))
    if not len(waveform):
        raise MediaError(f"{name} holds no audio samples; leave it out or record it again.")
    if not np.isfinite(waveform).all():
        raise MediaError(f"{name} holds samples that are not finite; repair it or leave it out.")
    return waveform[:MAX_SAMPLES], notes + (CUT_SOUND,) * (len(waveform) > MAX_SAMPLES + _PADDING)


def read_video(source: VideoSource, num_frames: int) -> tuple[list[tuple[float, np.ndarray]], tuple[str, ...]]:
    """At most `num_frames` evenly spaced frames, each (seconds from the start, uint8 [H, W, 3]); and notes.

    `source` is a path, or (uint8 frames [N, H, W, 3], frames per second). Seconds are the frame's index over the
    average frame rate, as in the reference. Raises `MediaError` for a file that is missing, damaged, without frames or
    of more than `MAX_PIXELS` in a frame or `MAX_VIDEO_PIXELS` in all.
    """
    name = source_name(source, "video")
    notes: tuple[str, ...] = ()
    if isinstance(source, tuple):
        legal = source[0].shape[3:] == (3,)
        pictures, fps = _checked_pixels(source[0], legal, "[N, H, W, 3]"), float(source[1])
        indices = sample_indices(len(pictures), num_frames)
        chosen = [pictures[i] for i in indices]
    else:
        total, notes = _count_packets(source, num_frames)
        indices = sample_indices(total, num_frames)
        chosen, fps, decoded = _decode_frames(source, indices)
        if len(chosen) < len(indices):  # some packets show no picture, or the end is damaged
            indices = sample_indices(decoded, num_frames)
            chosen, fps, _ = _decode_frames(source, indices)
    if not chosen:
        raise MediaError(f"{name} holds no frames; give a whole video.")
    if not 0 < fps < float("inf"):
        raise MediaError(f"{name} has fps={fps:g}, from which no timestamp follows; give its frames per second.")
    return [(index / fps, picture) for index, picture in zip(indices, chosen, strict=True)], notes


def sample_indices(total: int, num_frames: int) -> list[int]:
    """Which of `total` frames to keep: `num_frames` evenly spaced ones, all if there are fewer."""
    count = min(total, num_frames)
    return [i * total // count for i in range(count)]


def resample(frames: Iterable[AudioFrame]) -> np.ndarray:
    """16 kHz mono float32; reads no more of `frames` than tell whether there are more than 30 seconds."""
    resampler = av.AudioResampler(format="fltp", rate=SAMPLING_RATE)
    chunks = [np.zeros(0, np.float32)]
    for frame in itertools.chain(frames, [None]):
        # Averaged here because the resampler's own downmix of floats is louder by sqrt(2).
        chunks += [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]
        if sum(map(len, chunks)) > MAX_SAMPLES + _PADDING:
            break
    return np.concatenate(chunks)


def source_name(source: ImageSource | AudioSource | VideoSource, otherwise: str) -> str:
    """What an error calls `source`: its path, or else `otherwise`."""
    return str(source) if isinstance(source, str | Path) else f"the given {otherwise}"


def _existing(source: str | Path) -> Path:
    if not Path(source).is_file():
        raise MediaError(f"{source} is not a file; check the path.")
    return Path(source)


@contextmanager
def _opened(source: str | Path) -> Iterator[InputContainer]:
    path = _existing(source)
    try:
        with av.open(str(path)) as container:
            yield container
    except MediaError:
        raise
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path} cannot be decoded ({reason}); give a whole sound or video file.") from None


def _formats() -> list[str]:
    """What Pillow reads by itself. EPS is a program, which it would have Ghostscript run."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _first_of_many(image: Image.Image) -> tuple[str, ...]:
    # The other pictures of an MPO, a camera's form of JPEG, are previews and depths of the first.
    return (FIRST_FRAME,) * (getattr(image, "is_animated", False) and image.format != "MPO")


def _too_many_pixels(name: str) -> MediaError:
    return MediaError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels; scale it down or leave it out.")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise _too_many_pixels(name)
    if image.mode == "F" or image.mode.startswith("I"):
        raise MediaError(f"{name} has pixels of mode {image.mode}, which 8 bits would clip; scale it to 8 bits first.")
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _checked_pixels(array: np.ndarray, legal_shape: bool, shapes: str) -> np.ndarray:
    if array.dtype != np.uint8 or not legal_shape or 0 in array.shape[1:]:
        raise MediaError(f"the given array is {array.dtype} {list(array.shape)}; give uint8 {shapes}.")
    return array


def _checked_waveform(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        shape = list(waveform.shape)
        raise MediaError(f"the given waveform is {waveform.dtype} {shape}; give floats [samples] in [-1, 1].")
    if sampling_rate < 1:
        raise MediaError(f"sampling_rate={sampling_rate} is not a frequency; give it in Hz, as 16000.")
    return waveform.astype(np.float32)


def _audio_frame(waveform: np.ndarray, sampling_rate: int) -> AudioFrame:
    frame = AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
    frame.sample_rate = int(sampling_rate)
    return frame


def _count_packets(source: str | Path, num_frames: int) -> tuple[int, tuple[str, ...]]:
    """Packets of the first video stream, unlike a header's frame count known for every format; and notes."""
    with _opened(source) as container:
        if not container.streams.video:
            raise MediaError(f"{source} has no video stream; give a file with pictures.")
        stream = container.streams.video[0]
        # ffmpeg gives a bare stream without timestamps a rate of its own.
        guessed = not stream.average_rate or container.format.flags & _NO_TIMESTAMPS
        notes = (GUESSED_RATE,) * bool(guessed) + (SILENT_FILM,) * bool(container.streams.audio)
        notes += (FURTHER_STREAMS,) * (len(container.streams.video) > 1)
        count = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        pixels = stream.width * stream.height
        if pixels > MAX_PIXELS:
            raise _too_many_pixels(f"a frame of {source}")
        if pixels * min(count, num_frames) > MAX_VIDEO_PIXELS:
            raise MediaError(
                f"{source} has more than {MAX_VIDEO_PIXELS // 10**6} million pixels in the {min(count, num_frames)} "
                "frames that are taken; scale it down or leave it out."
            )
        return count, notes


def _decode_frames(source: str | Path, indices: list[int]) -> tuple[list[np.ndarray], float, int]:
    """The frames at ascending `indices` (fewer if the video ends before), frames per second, frames decoded."""
    wanted, found, decoded = set(indices), [], 0
    with _opened(source) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or FALLBACK_FPS)
        for frame in container.decode(stream):
            if decoded in wanted:
                found.append(np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90))
            decoded += 1
            if len(found) == len(indices):
                break
    return found, fps, decoded
