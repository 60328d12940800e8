"""Sounds: features, tokens and text equal the reference's; files come back as they were written."""

from __future__ import annotations

import itertools
import math
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data.media.process import MediaProcessor
from data.media.read import read_audio, resample
from model.media import MediaError
from tests.harness.media_reference import mel_reference, waveform_reference
from tests.harness.report import report

RATE = 16_000
BOUND = 1e-5
MEL = MediaProcessor()
RAW = MediaProcessor(audio_features="waveform")


def _time(seconds: float) -> np.ndarray:
    return np.arange(round(seconds * RATE)) / RATE


def _tone(seconds: float, hertz: float, volume: float = 0.5) -> np.ndarray:
    return volume * np.sin(2 * math.pi * hertz * _time(seconds))


def _chirp(seconds: float, start: float, end: float) -> np.ndarray:
    t = _time(seconds)
    return 0.7 * np.sin(2 * math.pi * (start + (end - start) * t / (2 * seconds)) * t)


def _noise(seconds: float, volume: float) -> np.ndarray:
    return volume * np.random.default_rng(round(seconds * 1000)).standard_normal(round(seconds * RATE))


def _vowels(seconds: float) -> np.ndarray:
    """Pulses of a gliding pitch through three formants: as uneven a spectrum as speech has."""
    t = _time(seconds)
    pulses = (np.diff(np.floor(np.cumsum(110 + 30 * np.sin(3 * t)) / RATE), prepend=0) > 0).astype(float)
    ring = _time(0.05)
    voice = sum(
        np.convolve(pulses, np.exp(-math.pi * 80 * ring) * np.sin(2 * math.pi * f * ring))[: len(t)]
        for f in (700, 1220, 2600)
    )
    return 0.3 * voice * (np.sin(2 * math.pi * 2 * t) > -0.5)


CLIPS: dict[str, np.ndarray] = {
    "161 samples": _noise(161 / RATE, 0.1),
    "800 samples": _noise(0.05, 0.1),
    "0.1 s": _tone(0.1, 300),
    "0.1 s and a sample": _noise(1601 / RATE, 0.1),
    "1599 samples": _noise(1599 / RATE, 0.1),
    "0.25 s": _chirp(0.25, 100, 7000),
    "128 whole": _noise(128 * 40 / RATE, 0.3),
    "tone 60 Hz": _tone(1.0, 60),
    "tone 1 kHz": _tone(1.0, 1000),
    "tone 7.9 kHz": _tone(1.3, 7900),
    "loud tone": _tone(1.0, 440, 1.0),
    "faint tone": _tone(1.0, 440, 1e-4),
    "chirp up": _chirp(2.0, 20, 8000),
    "chirp down": _chirp(2.777, 8000, 20),
    "white noise": _noise(3.0, 0.1),
    "faint noise": _noise(1.5, 1e-5),
    "silence": np.zeros(RATE),
    "clicks": (np.arange(2 * RATE) % 4000 == 0).astype(float),
    "clipped": np.clip(_tone(1.5, 220, 4.0), -1, 1),
    "beyond [-1, 1]": _tone(1.5, 220, 4.0),
    "constant": np.full(RATE, 0.5),
    "tone then silence": np.concatenate([_tone(1.0, 500), np.zeros(RATE)]),
    "vowels": _vowels(6.4),
    "29.99 s": _noise(29.99, 0.05),
    "30 s": _vowels(30.0),
    "35 s": _noise(35.0, 0.05),
}


def test_log_mel_frames_and_tokens_equal_the_reference() -> None:
    worst = 0.0
    for name, clip in CLIPS.items():
        for waveform in (clip.astype(np.float32), clip):  # the reference rounds float64 to float32
            item = MEL.audio((waveform, RATE))
            wanted, text = mel_reference(waveform)
            assert item.values.dtype == torch.float32 and item.values.shape == wanted.shape, name
            difference = (item.values - wanted).abs().max().item()
            assert difference < BOUND, name
            assert item.placeholder == text and item.num_tokens == text.count("<|audio|>"), name
            assert item.lengths == (len(wanted),) and item.positions.shape == (0, 2), name
            worst = max(worst, difference)
    _report("log-mel", len(CLIPS), worst)


def test_waveform_frames_and_tokens_equal_the_reference() -> None:
    worst = 0.0
    for name, clip in CLIPS.items():
        waveform = clip.astype(np.float32)
        item = RAW.audio((waveform, RATE))
        wanted, text = waveform_reference(waveform)
        assert item.values.dtype == torch.float32 and item.values.shape == wanted.shape, name
        worst = max(worst, (item.values - wanted).abs().max().item())
        assert item.placeholder == text and item.num_tokens == len(wanted) == sum(item.lengths), name
    _report("waveform (12B)", len(CLIPS), worst)
    assert worst == 0


@pytest.mark.parametrize(("samples", "frames", "tokens"), [(161, 1, 1), (16_000, 99, 25), (480_000, 2999, 750)])
def test_tokens_of_known_lengths(samples: int, frames: int, tokens: int) -> None:
    item = MEL.audio((np.zeros(samples, np.float32), RATE))
    assert (len(item.values), item.num_tokens) == (frames, tokens)
    assert (item.values == math.log(0.001)).all()


def test_clips_without_a_token_are_refused() -> None:
    for samples in (1, 159, 160):
        with pytest.raises(MediaError, match=f"{samples} samples at 16000 Hz, too few for one audio token"):
            MEL.audio((np.zeros(samples, np.float32), RATE))
    assert RAW.audio((np.zeros(1, np.float32), RATE)).num_tokens == 1


def _write_wav(path: Path, channels: np.ndarray, rate: int) -> None:
    """int16 [C, samples]."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(len(channels))
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(channels.T.tobytes())


def _encode(path: Path, codec: str, waveform: np.ndarray, rate: int) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(waveform[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.codec_context.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))


def test_a_wav_at_16_khz_comes_back_bit_by_bit(tmp_path: Path) -> None:
    samples = (CLIPS["vowels"] * 2**14).astype(np.int16)
    _write_wav(tmp_path / "a.wav", samples[None], RATE)
    wanted = (samples / 2**15).astype(np.float32)
    assert np.array_equal(read_audio(tmp_path / "a.wav")[0], wanted)
    assert torch.equal(MEL.audio(str(tmp_path / "a.wav")).values, MEL.audio((wanted, RATE)).values)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = (CLIPS["chirp up"] * 2**14).astype(np.int16), np.zeros(2 * RATE, np.int16)
    _write_wav(tmp_path / "a.wav", np.stack([left, right]), RATE)
    assert np.array_equal(read_audio(tmp_path / "a.wav")[0], (left / 2**16).astype(np.float32))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    t = np.arange(rate) / rate
    tone = (np.sin(2 * math.pi * 440 * t) * 2**14).astype(np.int16)
    _write_wav(tmp_path / "a.wav", tone[None], rate)
    found = read_audio(tmp_path / "a.wav")[0]
    assert len(found) == RATE
    middle = slice(500, -500)
    assert np.abs(found - _tone(1.0, 440))[middle].max() < 2e-4
    assert np.abs(found - read_audio((tone / np.float32(2**15), rate))[0]).max() < 1e-6


def test_files_longer_than_30_s_are_cut(tmp_path: Path) -> None:
    _write_wav(tmp_path / "a.wav", np.ones((1, 31 * 44_100), np.int16), 44_100)
    assert len(read_audio(tmp_path / "a.wav")[0]) == 30 * RATE
    for found in (MEL.audio(tmp_path / "a.wav"), RAW.audio(tmp_path / "a.wav"), RAW.audio((_tone(45.0, 440), RATE))):
        assert found.num_tokens == 750 and found.notes == ("sound cut after 30 s",)


def test_a_sound_of_30_s_is_whole(tmp_path: Path) -> None:
    _write_wav(tmp_path / "a.wav", np.ones((1, 30 * 44_100), np.int16), 44_100)
    _encode(tmp_path / "a.mp3", "libmp3lame", _tone(30.0, 440), RATE)
    decoded = [len(read_audio(tmp_path / name)[0]) for name in ("a.wav", "a.mp3")]
    assert decoded == [30 * RATE] * 2
    for source in (tmp_path / "a.wav", tmp_path / "a.mp3", (_tone(30.0, 440), RATE)):
        found = MEL.audio(source)
        assert found.num_tokens == 750 and found.notes == ()


def test_of_several_sounds_the_first_is_heard_and_that_is_noted(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "two.mka"), "w") as out:
        streams = [out.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        for level, stream in zip((300, 700), streams, strict=True):
            assert isinstance(stream, av.AudioStream)
            frame = av.AudioFrame.from_ndarray(np.full((1, 900), level, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
            for part in (frame, None):
                out.mux(stream.encode(part))
    found, notes = read_audio(tmp_path / "two.mka")
    assert np.array_equal(found, np.full(900, 300 / 2**15, np.float32))
    assert notes == ("further streams of one kind, of which the first is taken",)


def test_no_more_is_decoded_than_30_s_need() -> None:
    frame = av.AudioFrame.from_ndarray(np.ones((1, RATE), np.int16), format="s16", layout="mono")
    frame.sample_rate = RATE
    assert len(resample(itertools.repeat(frame, 90))) == 31 * RATE, "one frame more tells that there is more"


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp3", "libmp3lame", 44_100), ("a.ogg", "libopus", 48_000), ("a.flac", "flac", RATE), ("a.m4a", "aac", RATE)],
)
def test_compressed_files_sound_as_they_did(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    t = np.arange(rate) / rate
    _encode(tmp_path / name, codec, 0.5 * np.sin(2 * math.pi * 440 * t), rate)
    found = read_audio(tmp_path / name)[0]
    assert abs(len(found) - RATE) < 1600
    middle = found[4000:12_000]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 220
    assert abs(np.sqrt(2 * np.mean(middle**2)) - 0.5) < 0.03  # the mp3 encoder turns the volume down to 0.95


def test_sounds_that_cannot_be_used_say_so(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound at all")
    _write_wav(tmp_path / "empty.wav", np.zeros((1, 0), np.int16), RATE)
    with av.open(str(tmp_path / "mute.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        out.mux(stream.encode(None))
    for source, message in (
        (tmp_path / "no.wav", r"no\.wav is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "text.wav", r"text\.wav cannot be decoded \(Invalid data"),
        (tmp_path / "empty.wav", r"empty\.wav holds no audio samples"),
        (tmp_path / "mute.mp4", r"mute\.mp4 has no audio stream"),
        ((np.zeros(0, np.float32), RATE), "given waveform holds no audio samples"),
        ((np.zeros(900, np.int16), RATE), "int16"),
        ((np.zeros((2, 900), np.float32), RATE), r"\[2, 900\]"),
        ((np.full(900, np.nan, np.float32), RATE), "not finite"),
        ((np.zeros(900, np.float32), 0), "sampling_rate=0"),
    ):
        with pytest.raises(MediaError, match=message) as raised:
            MEL.audio(source)
        assert str(raised.value).count("\n") == 0


def test_a_variant_that_hears_nothing_says_so() -> None:
    with pytest.raises(MediaError, match="hears nothing"):
        MediaProcessor(audio_features=None).audio((np.zeros(RATE, np.float32), RATE))


def _report(what: str, count: int, worst: float) -> None:
    report("Media equal to transformers", {"what": what, "items": count, "max |difference|": f"{worst:.1e}"})
