"""Packing of media, and media that do not fit their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import Gemma4Config
from model.media import Media, MediaError
from tests.harness.multimodal import image_grid, make_example
from tests.harness.report import report

E4B = Gemma4Config.from_name("gemma4_tiny_e4b")
B31 = Gemma4Config.from_name("gemma4_tiny_31b")


def test_patches_of_one_soft_token_lie_together_in_reading_order() -> None:
    example = make_example(E4B, [[("image", 3, 2)]], seed=0)
    assert example.media is not None and example.media.vision is not None
    positions = example.media.vision.positions_T2.view(6, 9, 2) // 3
    assert (positions == positions[:, :1]).all()
    assert positions[:, 0].tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert example.media.vision.places.index.tolist() == list(range(1, 7))


def build(config: Gemma4Config, tokens: list[int], images: Any = (), clips: Any = ()) -> Media:
    return Media.build(config, torch.tensor([tokens]), images, clips)


GRID = image_grid(E4B, 2, 2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (E4B, [5] + [E4B.audio_token_id] * 3, (), [torch.zeros(20, 128)]),
            "3 audio tokens in the batch, but its media make 5",
        ),
        ((E4B, [E4B.image_token_id] * 5, [GRID]), "5 image and video tokens in the batch, but its media make 4"),
        (
            (E4B, [E4B.image_token_id] * 4, [GRID], [torch.zeros(20, 128)]),
            "0 audio tokens in the batch, but its media make 5",
        ),
        ((B31, [5], (), [torch.zeros(20, 128)]), "this model has no audio encoder; leave sound out"),
        ((E4B.replace(vision=None), [5], [GRID]), "this model has no vision encoder; leave images"),
        ((E4B, [5], (), [torch.zeros(20, 64)]), r"frames \[20, 64\]; this model takes frames of 128 numbers"),
        ((E4B, [5], (), [torch.zeros(0, 128)]), r"frames \[0, 128\]"),
        (
            (E4B, [5], [(GRID[0][:8], GRID[1][:8])]),
            r"patches \[8, 768\]; this model takes a multiple of 9 patches of 768",
        ),
        ((E4B, [5], [(GRID[0], GRID[1] + 500)]), "one position for each patch, from 0 to 255 along each side"),
    ],
)
def test_media_that_do_not_fit_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        build(*arguments)
    report("Media that do not fit", {"message": str(caught.value)})
