"""What is integer about a batch: made once, and all of it before the model."""

from __future__ import annotations

import pickle

import pytest
import torch

from data.batch import IGNORE, collate
from model import Gemma4, Gemma4Config
from model.inputs import Inputs, make_inputs
from tests.harness.meshes import Case, sequences
from tests.harness.multimodal import make_example


def test_soft_tokens_are_padding_to_the_tables_and_keep_their_places() -> None:
    config = Gemma4Config.from_name("gemma4_tiny_e4b")
    example = make_example(config, [[6, ("image", 2, 2), 9], [3, ("audio", 30), 20]], seed=0)
    inputs = make_inputs(config, example.tokens_BS, media=example.media)
    media = inputs.media
    assert media is not None and media.vision is not None and media.audio is not None
    places = torch.cat((media.vision.places.index, media.audio.places.index))
    is_media = torch.zeros(len(inputs.tokens_T), dtype=torch.bool)
    is_media[places] = True
    assert (inputs.tokens_T[is_media] == config.pad_token_id).all()
    assert torch.equal(inputs.tokens_T[~is_media], example.tokens_BS.flatten()[~is_media])
    assert len(media.vision.places.index) == 4 and inputs.kept is None


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_a_collated_batch_brings_what_kernels_ask_of_it(variant: str) -> None:
    """Also out of a worker of the loader, through which it is pickled; a move to a device makes nothing anew."""
    case = Case(variant)
    batch = pickle.loads(pickle.dumps(collate(sequences(case, 0), case.config)))
    inputs: Inputs = batch.inputs
    assert inputs.kept is not None and inputs.kept.count == int((batch.labels_BS != IGNORE).sum()) > 0
    assert torch.equal(batch.labels_T, batch.labels_BS[batch.labels_BS != IGNORE])
    moved = inputs.to(torch.device("cpu"))
    assert moved.kept is not None
    for before, after in ((inputs.masks, moved.masks), (inputs.kept.masks, moved.kept.masks)):
        for layer_type, mask in before.items():
            assert {"blocks", "padding"} <= vars(mask).keys()
            assert vars(after[layer_type])["blocks"] is mask.blocks
    assert all(mask.num_queries == inputs.kept.count for mask in inputs.kept.masks.values())
    model = Gemma4(case.config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.run(inputs), model.run(moved))
