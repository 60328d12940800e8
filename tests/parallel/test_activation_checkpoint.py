"""Recomputation: the same gradients bit for bit, and less kept for the backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchtitan.components.checkpointer.utils import canonical_fqn

from model import Gemma4, Gemma4Config
from model.head import linear_cross_entropy
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.options import ActivationCheckpointConfig
from tests.harness.multimodal import make_example
from tests.harness.report import report

MODES = {"none": ("none", 1), "selective": ("selective", 1), "full": ("full", 1), "full, every 3rd": ("full", 3)}


def step(name: str, mode: str, every: int) -> tuple[dict[str, Tensor], int]:
    """Gradients of one batch with an image, and the bytes autograd kept for them."""
    config = Gemma4Config.from_name(name)
    model = Gemma4(config)
    model.init_weights(torch.Generator().manual_seed(0))
    apply_activation_checkpoint(model, ActivationCheckpointConfig(mode, every))
    example = make_example(config, [[60, ("image", 2, 2), 40], [90]], seed=0)
    keep = example.labels_BS != -100
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(example.tokens_BS, supervised=keep, media=example.media)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = sum(size for pointer, size in kept.items() if pointer not in weights)
    loss = linear_cross_entropy(
        hidden, model.head_weight, example.labels_BS[keep], softcap=config.final_logit_softcapping
    )
    loss.total.backward()
    grads = {canonical_fqn(key): p.grad for key, p in model.named_parameters() if p.grad is not None}
    return grads, held


@pytest.mark.parametrize("name", ["gemma4_tiny_e2b", "gemma4_tiny_e4b", "gemma4_tiny_26b_a4b", "gemma4_tiny_31b"])
def test_gradients_stay_and_memory_falls(name: str) -> None:
    found = {mode: step(name, *options) for mode, options in MODES.items()}
    expected, everything = found["none"]
    # What selective recomputation keeps lies in a cache of torch's own, which the hooks do not see.
    held = {mode: size for mode, (_, size) in found.items() if mode != "selective"}
    report("Kept for the backward, KiB", {"variant": name} | {mode: size >> 10 for mode, size in held.items()})
    for mode, (grads, _) in found.items():
        assert grads.keys() == expected.keys()
        for key, grad in grads.items():
            assert torch.equal(grad, expected[key]), (mode, key)
    assert held["full"] < held["full, every 3rd"] < everything
