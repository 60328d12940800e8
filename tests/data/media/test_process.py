"""Settings of the media processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data.media.process import MediaProcessor
from model.media import MediaError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_tokens": 300}, "image_tokens=300 .*: 280"),
        ({"video_tokens": 1}, "video_tokens=1 .*: 70"),
        ({"image_tokens": 5000}, "image_tokens=5000 .*: 1120"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"audio_features": "mfcc"}, "audio_features='mfcc'"),
    ],
)
def test_settings_that_are_not_legal_say_so(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        MediaProcessor(**settings)
    assert str(raised.value).count("\n") == 0


def test_settings_reach_what_they_set() -> None:
    frames = np.zeros((9, 480, 640, 3), np.uint8)
    processor = MediaProcessor(image_tokens=140, video_tokens=280, num_frames=4)
    assert 70 < processor.image(frames[0]).num_tokens <= 140
    video = processor.video((frames, 3.0))
    assert len(video.lengths) == 4 and 140 < video.num_tokens // 4 <= 280
    small = MediaProcessor(patch_size=8, pooling_kernel_size=2).image(frames[0])
    assert small.values.shape[1] == 8 * 8 * 3 and small.num_tokens == len(small.values) // 4
