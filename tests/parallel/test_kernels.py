"""The choice of kernels, and their comparison with torch's path; the kernels run by Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from model import ConfigError, Gemma4, Gemma4Config
from model.attention_kernels import blocked, flex, kernel_for, triton
from model.inputs import make_inputs
from model.triton_choice import triton_for
from parallel import kernels
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.kernels import check_kernels, choose_kernels, kernel_differences
from parallel.options import ActivationCheckpointConfig
from tests.harness.compare import hold, relative_error

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="kernels are run by Triton's interpreter: make test-kernels",
)


def test_a_cpu_keeps_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose_kernels("auto", CPU) and not choose_kernels("torch", CPU)
    with pytest.raises(ConfigError, match=r"^parallel\.kernels=triton needs a GPU, this run is on cpu; "):
        choose_kernels("triton", CPU)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"Triton is not installed; install it \(pip install 'gemw"):
        choose_kernels("triton", torch.device("cuda"))
    assert not choose_kernels("auto", torch.device("cuda"))


def test_attention_is_chosen_by_device_width_and_dtype() -> None:
    assert kernel_for("cuda", 256, torch.bfloat16) is flex and kernel_for("cuda", 512, torch.bfloat16) is blocked
    with triton_for("cuda"):
        for width in (256, 512):
            assert kernel_for("cuda", width, torch.bfloat16) is triton
            assert kernel_for("cpu", width, torch.bfloat16) is blocked
        assert kernel_for("cuda", 512, torch.float32) is blocked and kernel_for("cuda", 256, torch.float32) is flex
    assert kernel_for("cuda", 256, torch.bfloat16) is flex


def test_a_kernel_that_is_off_or_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> float:
        raise RuntimeError("out of resource: shared memory,\n Required: 263168")

    config = Gemma4Config.from_name("tiny_31b")
    for run, message in (
        (lambda: 0.5, "the kernel of norm is off by 5.0e-01 on this GPU; set parallel.kernels=torch"),
        (lambda: float("nan"), "is off by nan"),
        (
            broken,
            r"the kernel of norm does not run on this GPU \(out of resource: .*, Required: 263168\); set",
        ),
    ):
        monkeypatch.setattr(kernels, "kernel_differences", lambda *_, run=run: [("norm", run)])
        with pytest.raises(ConfigError, match=message):
            check_kernels(config, CPU, torch.bfloat16)


@interpreted
def test_every_kernel_says_what_torch_says() -> None:
    config = Gemma4Config.from_name("tiny_26b_a4b")
    found = {name: run() for name, run in kernel_differences(config, CPU, torch.float16)}
    assert len(found) == 8
    for name, off in found.items():
        hold("kernels of Triton beside torch's path, float16", off, 3e-3, name)


@interpreted
@pytest.mark.parametrize("variant", ["e2b", "26b_a4b"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_model_is_the_same_by_either(variant: str, mode: str) -> None:
    """Loss and gradients; in float16, since the interpreter multiplies no bfloat16. With attention kept, too."""
    experts = {"num_experts": 4, "moe_intermediate_size": 16} if variant == "26b_a4b" else {"num_kv_shared_layers": 2}
    sizes = {"num_hidden_layers": 4, "sliding_window_pattern": 2, "hidden_size": 32, "vocab_size": 64} | experts
    config = Gemma4Config.from_name(f"tiny_{variant}", vision=None, audio=None, **sizes)
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    keep = torch.arange(24).expand(2, 24) % 3 > 0
    found = []
    for devices in ((), ("cpu",)):
        with triton_for(*devices):
            model = Gemma4(config)
            model.init_weights(torch.Generator().manual_seed(0))
            for name, parameter in model.named_parameters():
                if name.endswith("q_norm.weight"):
                    parameter.data.fill_(parameter.numel() ** -0.5)
            model.half()
            apply_activation_checkpoint(model, ActivationCheckpointConfig(mode=mode))
            inputs = make_inputs(config, tokens, supervised=keep)
            labels = tokens.roll(-1, 1)[keep]
            loss = model.head(model.run(inputs), model.head_weight, labels).total / len(labels)
            loss.backward()
            found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, of_plain), (ours, of_ours) = found
    assert of_plain.keys() == of_ours.keys()
    hold("a model by Triton's kernels, float16: loss", relative_error(ours, plain), 1e-3, variant)
    for name, grad in of_plain.items():
        hold(
            "a model by Triton's kernels, float16: gradients",
            relative_error(of_ours[name], grad),
            3e-2,
            (variant, name),
        )


@interpreted
@pytest.mark.parametrize(("mode", "runs"), [("none", 1), ("full", 2), ("selective", 1)])
def test_selective_recomputation_keeps_attention(mode: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import model.kernels.attention as attention

    counted, kernel = [], attention.forward

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counted.append(grid)
            return kernel[grid]

    monkeypatch.setattr(attention, "forward", Counting())
    config = Gemma4Config.from_name("tiny_31b", vision=None, num_hidden_layers=2, hidden_size=32, vocab_size=64)
    with triton_for("cpu"):
        model = Gemma4(config)
        model.init_weights(torch.Generator().manual_seed(0))
        model.half()
        apply_activation_checkpoint(model, ActivationCheckpointConfig(mode=mode))
        model(torch.arange(3, 15)[None]).sum().backward()
    assert len(counted) == runs * config.num_hidden_layers
