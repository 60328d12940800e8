"""What only a GPU can show: kernels, gradients, host waits and speed on one card, in a few minutes.

python -m launch.benchmarks.gpu                      # every check on cuda:0
python -m launch.benchmarks.gpu attention json=gpu.json
python -m launch.benchmarks.gpu device=cpu           # a dry run on small shapes, the CPU's kernels in the GPU's place

Needs torch (2.11 or newer), numpy, safetensors and tokenizers only. Each check has its own time and verdict; one that
fails does not keep the others from running. The exit status is the number of checks that failed.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.arguments import run
from launch.benchmarks.place import Place, Wrong, near
from model import Gemma4Config
from model.attention_kernels import AttentionKernel, blocked, flex, kernel_for, triton
from model.head import linear_cross_entropy, softcapped_logits
from model.inputs import make_inputs
from model.masks import AttentionMask, attention_mask
from model.moe import grouped_mm
from model.norm import rms_norm
from model.triton_choice import has_triton, triton_for
from parallel.kernels import kernel_differences

Found = dict[str, Any]
"""Numbers of a check, by name."""

VARIANTS = ("e2b", "e4b", "12b", "26b_a4b", "31b")


def environment(place: Place) -> Found:
    """Versions, and what Triton needs to build kernels: a compiler and Python's headers."""
    found: Found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found["gcc"] = shutil.which("gcc") or shutil.which("cc") or "missing"
    found["Python.h"] = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    if place.real:
        properties = torch.cuda.get_device_properties(place.device)
        free, total = torch.cuda.mem_get_info(place.device)
        found |= {"card": properties.name, "free GiB": free / 2**30, "GiB": total / 2**30}
        found["shared memory"] = getattr(properties, "shared_memory_per_block_optin", None)
    return found


def attention(place: Place) -> Found:
    """Every kernel at the widths of its layers, against the formula in float32, values and gradients in bfloat16."""
    found: Found = {}
    length = place.size(2048, 48)
    for width, window, heads, kv_heads in (
        (256, 512, 8, 1),
        (256, 1024, 32, 16),
        (512, None, 8, 1),
        (512, None, 32, 4),
    ):
        q = place.drawn(length, heads, width, dtype=torch.bfloat16, scale=width**-0.5)
        k, v = (place.drawn(1, length, kv_heads, width + extra, dtype=torch.bfloat16)[..., :width] for extra in (0, 2))
        documents = (torch.arange(length) > length // 3).long()[None]
        mask = attention_mask(1, length, window=window, document_ids_BS=documents)
        grad = place.drawn(length, heads, width + 4).detach()[..., :width]
        wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
        expected = _formula(wide, mask.dense().to(place.device))
        expected_grads = torch.autograd.grad(expected, wide, grad)
        chosen = kernel_for(place.device.type, width, torch.bfloat16)
        for kernel in dict.fromkeys((chosen, blocked, *((triton,) if place.real and has_triton() else ()))):
            name = f"{kernel.__name__} {width}/{window}/{heads}:{kv_heads}"
            inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            on_device = mask.to(place.device)
            call = partial(_attend, kernel, inputs, on_device, grad)
            out, *grads = call()
            near(name, out, expected, 1e-2)
            for letter, one, other in zip("qkv", grads, expected_grads, strict=True):
                near(f"{name} d{letter}", one, other, 2e-2)
            found[f"{name} ms"] = place.seconds(call) * 1e3
    if place.real and not any(name.startswith(flex.__name__) for name in found):
        raise Wrong("no layer went through flex attention")
    return found


def _attend(kernel: AttentionKernel, inputs: Sequence[Tensor], mask: AttentionMask, grad: Tensor) -> tuple[Tensor, ...]:
    q, k, v = inputs
    out = kernel(q, k, v, mask)
    return (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))


def _formula(inputs: Sequence[Tensor], visible: Tensor) -> Tensor:
    q, *rest = inputs
    groups = q.shape[1] // rest[0].shape[2]
    k, v = (t[0].repeat_interleave(groups, dim=1) for t in rest)
    scores = torch.einsum("tnh,snh->nts", q, k).masked_fill(~visible, float("-inf"))
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v)


def norm(place: Place) -> Found:
    """RMSNorm in bfloat16 against float32, also of no rows."""
    rows, width = place.size(8192, 64), place.size(5376, 96)
    x, weight = place.drawn(rows, width, dtype=torch.bfloat16), place.drawn(width, dtype=torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    grad = place.drawn(rows + 1, width).detach()[1:]

    def call() -> tuple[Tensor, ...]:
        out = rms_norm(x, weight, 1e-6)
        return (out, *torch.autograd.grad(out, (x, weight), grad.to(out.dtype)))

    expected = F.rms_norm(wide[0], (width,), wide[1], 1e-6)
    for name, one, other in zip(
        ("value", "dx", "dw"), call(), (expected, *torch.autograd.grad(expected, wide, grad)), strict=True
    ):
        near(name, one, other, 1e-2)
    empty = rms_norm(x[:0], weight, 1e-6)
    empty.sum().backward()
    return {"ms": place.seconds(call) * 1e3, "rows of none": tuple(empty.shape)}


def loss(place: Place) -> Found:
    """The fused loss in bfloat16 against the plain one in float32, and its memory."""
    tokens, vocabulary, width = place.size(2048, 70), place.size(262_144, 900), place.size(2816, 32)
    hidden = place.drawn(tokens, width, dtype=torch.bfloat16)
    table = place.drawn(vocabulary, width, dtype=torch.bfloat16, scale=width**-0.5)
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).to(place.device)

    def call() -> tuple[Tensor, ...]:
        total = linear_cross_entropy(hidden, table, labels, softcap=30.0).total
        return (total.detach(), *torch.autograd.grad(total, (hidden, table)))

    if place.real:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if place.real else 0
    with place.no_waits():
        found = call()
    peak = torch.cuda.max_memory_allocated() - before if place.real else 0
    wide = [t.detach().float().requires_grad_() for t in (hidden, table)]
    plain = F.cross_entropy(softcapped_logits(wide[0] @ wide[1].T, 30.0), labels, reduction="sum")
    expected = (plain, *torch.autograd.grad(plain, wide))
    for name, one, other, bound in zip(("value", "dh", "dW"), found, expected, (1e-3, 1e-2, 1e-2), strict=True):
        near(name, one, other, bound)
    return {"ms": place.seconds(call) * 1e3, "peak GiB": peak / 2**30}


def experts(place: Place) -> Found:
    """The grouped product with experts that get nothing, all, or no rows at all, forward and backward."""
    num, width, inner, rows = 16, place.size(2816, 32), place.size(1408, 16), place.size(4096, 48)
    weight = place.drawn(num, width, inner, dtype=torch.bfloat16, scale=width**-0.5)
    shares = {
        "balanced": [rows // num] * num,
        "empty ends": [0, *([rows // (num - 2)] * (num - 2)), 0],
        "all to one": [0] * 5 + [rows] + [0] * 10,
        "none": [0] * num,
    }
    found: Found = {}
    for name, counts in shares.items():
        x = place.drawn(sum(counts), width, dtype=torch.bfloat16)
        offsets = torch.tensor(counts).cumsum(0).to(place.device, torch.int32)
        grad = place.drawn(sum(counts) + 1, inner, dtype=torch.bfloat16).detach()[1:]
        with place.no_waits():
            out = grouped_mm(x, weight, offs=offsets)
            grads = torch.autograd.grad(out, (x, weight), grad)
        wide = [t.detach().float().requires_grad_() for t in (x, weight)]
        spans = [slice(a, b) for a, b in pairwise([0, *torch.tensor(counts).cumsum(0).tolist()])]
        expected = torch.cat([wide[0][span] @ wide[1][e] for e, span in enumerate(spans)])
        for what, one, other in zip(
            ("value", "dx", "dW"),
            (out, *grads),
            (expected, *torch.autograd.grad(expected, wide, grad.float())),
            strict=True,
        ):
            found[f"{name} {what}"] = near(f"{name} {what}", one, other, 1e-2)
    return found


def variants(place: Place) -> Found:
    """One pattern of each variant with heads of real width: float32 against the CPU, bfloat16 against float32."""
    found: Found = {}
    cpu = torch.device("cpu")
    for name in VARIANTS if place.real else ("e2b", "26b_a4b"):
        config = place.tiny(name)
        reference, reference_grads = _step(config, cpu, torch.float32, place)
        value, grads = _step(config, place.device, torch.float32, place)
        found[f"{name} float32"] = near(f"{name} loss", value, reference, 1e-5)
        for key, grad in grads.items():
            near(f"{name} {key}", grad, reference_grads[key], 1e-3)
        value, grads = _step(config, place.device, torch.bfloat16, place)
        near(f"{name} bfloat16 loss", value, reference, 2e-2)
        one, other = (
            torch.cat([g[key].flatten().double() for key in reference_grads]) for g in (grads, reference_grads)
        )
        found[f"{name} bfloat16 cosine"] = F.cosine_similarity(one, other, dim=0).item()
        # Where two experts score alike, rounding sends a token to the other one.
        if found[f"{name} bfloat16 cosine"] < (0.8 if config.moe else 0.97):
            raise Wrong(
                f"{name}: gradients in bfloat16 have cosine {found[f'{name} bfloat16 cosine']:.3f} with float32's"
            )
    return found


def _step(
    config: Gemma4Config, device: torch.device, dtype: torch.dtype, place: Place
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients of a packed batch with unsupervised stretches, on the CPU."""
    model = Place(device).model(config, dtype)
    length = place.size(512, 64)
    tokens = torch.randint(3, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(length) > length // 2).long().expand(2, length)
    keep = (torch.arange(length) % 16 < 9).expand(2, length).clone()
    keep[:, -1] = False
    inputs = make_inputs(config, tokens, document_ids=documents, supervised=keep).to(device)
    labels = tokens.roll(-1, 1)[keep].to(device)
    total = model.head(model.run(inputs), model.head_weight, labels).total / len(labels)
    total.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return total.detach().float().cpu(), grads


def waits(place: Place) -> Found:
    """Nothing between a batch's arrival and its gradients makes the host wait, once kernels are built."""
    for name in ("12b", "26b_a4b", "31b") if place.real else ("26b_a4b",):
        config = place.tiny(name)
        model = place.model(config, torch.bfloat16)
        tokens = torch.randint(3, config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(1))
        keep = torch.ones_like(tokens, dtype=torch.bool)
        inputs, labels = (
            make_inputs(config, tokens, supervised=keep).to(place.device),
            tokens.flatten().to(place.device),
        )

        def call(model: Any = model, inputs: Any = inputs, labels: Any = labels) -> None:
            model.head(model.run(inputs), model.head_weight, labels).total.backward()

        call()
        place.wait()
        with place.no_waits():
            call()
    return {}


def throughput(place: Place) -> Found:
    """Layers of the 31B at their real size: forward and backward, by the operations that count."""
    config = Gemma4Config.from_name("gemma4_31b").replace(vision=None, audio=None)
    if not place.real:
        config = Gemma4Config.from_name("gemma4_tiny_31b").replace(vision=None, audio=None)
    length, found = place.size(8192, 96), dict[str, Any]()
    from train.flops import training_flops

    for layers in (5, 6):  # five sliding ones, then a full one too
        cut = config.replace(num_hidden_layers=layers, vocab_size=1024, sliding_window_pattern=6)
        model = place.model(cut, torch.bfloat16)
        tokens = torch.randint(3, 1024, (1, length), generator=torch.Generator().manual_seed(0))
        keep = torch.ones_like(tokens, dtype=torch.bool)
        on_cpu = make_inputs(cut, tokens, supervised=keep)
        inputs, labels = on_cpu.to(place.device), tokens.flatten().to(place.device)

        def call(model: Any = model, inputs: Any = inputs, labels: Any = labels) -> None:
            model.head(model.run(inputs), model.head_weight, labels).total.backward()
            model.zero_grad()

        seconds = place.seconds(call)
        found[f"{layers} layers ms"] = seconds * 1e3
        found[f"{layers} layers TFLOP/s"] = training_flops(cut, on_cpu) / seconds / 1e12
        if place.real:
            found[f"{layers} layers peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    found["the full layer ms"] = found["6 layers ms"] - found["5 layers ms"]
    return found


def fused(place: Place) -> Found:
    """Triton's kernels beside torch's path, at the widths of two variants; then the layers of the 31B through them."""
    found: Found = {}
    if not (place.real and has_triton()):
        return found
    for name in ("31b", "26b_a4b"):
        config = Gemma4Config.from_name(f"gemma4_{name}")
        for kernel, measured in kernel_differences(config, place.device, torch.bfloat16):
            found[f"{name}: {kernel}"] = off = measured()
            if not off < 2e-2:
                raise Wrong(f"the kernel of {kernel} is off by {off:.1e} at the widths of {name}")
    with triton_for(place.device.type):
        found |= {f"by triton, {name}": value for name, value in throughput(place).items()}
    return found


CHECKS: dict[str, Callable[[Place], Found]] = {
    check.__name__: check for check in (environment, attention, variants, norm, loss, experts, waits, throughput, fused)
}


@dataclass
class Verdict:
    """What a check found, and what was wrong, if anything was."""

    check: str
    seconds: float
    found: Found
    wrong: str | None = None


@dataclass
class Options:
    """Arguments of the command."""

    what: list[str] = field(default_factory=lambda: list(CHECKS), metadata={"choices": tuple(CHECKS)})
    device: str = "cuda"
    json: str | None = None


def verdict(name: str, place: Place) -> Verdict:
    """Run one check; whatever goes wrong in it is its verdict."""
    start = time.perf_counter()
    try:
        found = CHECKS[name](place)
        return Verdict(name, time.perf_counter() - start, found)
    except Wrong as error:
        return Verdict(name, time.perf_counter() - start, {}, str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        what = f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"
        return Verdict(name, time.perf_counter() - start, {}, what)


def checks(options: Options) -> None:
    """Run checks one after the other, and end with the number of those that failed."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU here; device=cpu makes a dry run")
        return
    place, verdicts = Place(torch.device(options.device)), []
    for name in options.what:
        one = verdict(name, place)
        verdicts.append(one)
        print(
            f"{one.check:>12} {one.seconds:6.1f} s  {'ok' if one.wrong is None else 'WRONG: ' + one.wrong}", flush=True
        )
        for key, value in one.found.items():
            print(f"{'':>22}{key}: {f'{value:.4g}' if isinstance(value, float) else value}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([vars(one) for one in verdicts], indent=1, default=str))
    sys.exit(sum(one.wrong is not None for one in verdicts))


def main() -> None:
    """Run the command line's checks."""
    run(Options, checks, __doc__, "what")


if __name__ == "__main__":
    main()
