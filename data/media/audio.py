"""16 kHz waveforms made into what an audio encoder reads (docs/gemma4.md 10.3)."""

from __future__ import annotations

import numpy as np
from torch import Tensor, from_numpy

WINDOW, HOP, FFT, MELS = 320, 160, 512, 128
SAMPLES_PER_TOKEN = 640
"""40 ms, in either form."""


def _mel_filters() -> np.ndarray:
    """HTK triangles over 0 to 8000 Hz, each of height 1 [FFT // 2 + 1, MELS]."""
    top = 2595 * np.log10(1 + 8000 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    bins = np.linspace(0, 8000, FFT // 2 + 1)
    return np.stack([np.interp(bins, edges[i : i + 3], [0, 1, 0]) for i in range(MELS)], axis=1)


_FILTERS = _mel_filters()
_HANN = np.hanning(WINDOW + 1)[:-1].astype(np.float32)


def log_mel(waveform: np.ndarray) -> Tensor:
    """float32 waveform [samples] -> ln(mel + 0.001), float32 [T, 128]; one frame a 10 ms.

    The first window starts half a window before the waveform. A frame counts only if one more sample follows its
    window, so T = (samples - 1) // 160. The transform stays in float32: its rounding noise shows beside the 0.001.
    """
    frames = (len(waveform) - 1) // HOP
    padded = np.concatenate([np.zeros(WINDOW // 2, np.float32), waveform, np.zeros(WINDOW, np.float32)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: max(frames, 0)]
    magnitude = np.abs(np.fft.rfft(windows * _HANN, n=FFT))
    return from_numpy(np.log(magnitude @ _FILTERS + 0.001).astype(np.float32))


def waveform_frames(waveform: np.ndarray) -> Tensor:
    """float32 waveform [samples] -> [T, 640], its end filled with zeros."""
    padded = np.pad(waveform, (0, -len(waveform) % SAMPLES_PER_TOKEN))
    return from_numpy(padded.reshape(-1, SAMPLES_PER_TOKEN))
