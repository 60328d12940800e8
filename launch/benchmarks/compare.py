"""Ratios measured side by side in one run; times alone depend on the machine.

python -m launch.benchmarks.compare loss         # fused linear cross entropy against the plain one: memory and time
python -m launch.benchmarks.compare attention    # a sliding layer: blocked kernel against SDPA with a mask
python -m launch.benchmarks.compare supervised   # a step that skips unsupervised work against one that does not
python -m launch.benchmarks.compare memory       # host memory of a step on one rank and on four: context, loss, table
python -m launch.benchmarks.compare load         # host memory of two ranks that load a checkpoint of 6.4 GB

Several may be named. rounds=5 are counted of attention and supervised, after one that warms up.
"""

from __future__ import annotations

import os
import pickle
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.arguments import run
from launch.benchmarks.memory import load, memory
from model import Gemma4, Gemma4Config, UserError
from model.attention_kernels import blocked
from model.head import linear_cross_entropy, softcapped_logits
from model.masks import attention_mask

SOFTCAP = 30.0


def side_by_side(functions: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, run in turn after one warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def in_a_process(function: Callable[[], Any]) -> Any:
    """Call in a process of its own, whose memory peak is its own too."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(write, "wb") as out:
            pickle.dump(function(), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        data = answer.read()
    _, status = os.waitpid(child, 0)
    if not data:
        raise UserError(f"the measuring process ended with status {status}; likely out of memory.")
    return pickle.loads(data)


def loss() -> None:
    """Print peak memory and time of the fused loss beside logits that are held whole."""
    vocab, width = 262_144, 256
    print(f"loss, forward and backward, V {vocab:,}, D {width}, float32, {torch.get_num_threads()} threads")
    print(f"{'tokens':>7} {'loss':>6} {'peak MiB':>9} {'seconds':>8} {'[T, V] MiB':>10}")
    for tokens in (1024, 4096):
        found = {}
        for name in ("fused", "plain"):

            def measure(name: str = name, tokens: int = tokens) -> tuple[int, float, float]:
                generator = torch.Generator().manual_seed(0)
                hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
                weight = torch.randn(vocab, width, generator=generator).mul_(0.1).requires_grad_()
                labels = torch.randint(0, vocab, (tokens,), generator=generator)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                start = time.perf_counter()
                if name == "fused":
                    total = linear_cross_entropy(hidden, weight, labels, softcap=SOFTCAP).total
                else:
                    total = F.cross_entropy(softcapped_logits(hidden @ weight.T, SOFTCAP), labels, reduction="sum")
                total.backward()
                seconds = time.perf_counter() - start
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds, total.item()

            found[name] = in_a_process(measure)
            peak, seconds, _ = found[name]
            print(f"{tokens:>7} {name:>6} {peak >> 10:>9,} {seconds:>8.2f} {tokens * vocab * 4 >> 20:>10,}")
        (peak, seconds, value), (plain_peak, plain_seconds, plain_value) = found["fused"], found["plain"]
        print(
            f"{tokens:>7} plain / fused: memory {plain_peak / peak:.1f}x, time {plain_seconds / seconds:.2f}x, "
            f"relative difference of the loss {abs(value / plain_value - 1):.1e}"
        )


def attention(rounds: int) -> None:
    """Print times of the blocked CPU kernel beside torch's own attention with a dense mask, forward and backward."""
    length, window, heads, kv_heads, width = 4096, 512, 8, 2, 256
    generator = torch.Generator().manual_seed(0)
    q = (torch.randn(length, heads, width, generator=generator) * width**-0.5).requires_grad_()
    k, v = (torch.randn(1, length, kv_heads, width, generator=generator).requires_grad_() for _ in range(2))
    grad = torch.randn(length, heads, width, generator=generator)
    mask = attention_mask(1, length, window=window)
    dense = mask.dense()[None, None]

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))

    def ours() -> tuple[Tensor, ...]:
        return backward(blocked(q, k, v, mask))

    def sdpa() -> tuple[Tensor, ...]:
        q_BNSH, k_BKSH, v_BKSH = (t.transpose(1, 2) for t in (q[None], k, v))
        out = F.scaled_dot_product_attention(q_BNSH, k_BKSH, v_BKSH, attn_mask=dense, scale=1.0, enable_gqa=True)
        return backward(out[0].transpose(0, 1))

    differences = [(a - b).abs().max().item() for a, b in zip(ours(), sdpa(), strict=True)]
    fast, slow = side_by_side((ours, sdpa), rounds)
    print(f"sliding layer, S {length}, W {window}, {heads} heads over {kv_heads} KV heads of {width}, float32")
    print(f"blocked {fast:.3f} s, SDPA with a mask {slow:.3f} s, ratio {slow / fast:.1f}x (medians of {rounds})")
    print("max difference of output, dq, dk, dv:", ", ".join(f"{d:.1e}" for d in differences))


def supervised(rounds: int) -> None:
    """Print times of a step that prunes unsupervised positions beside one that computes all of them."""
    print("training step at B 2, S 512, some share of the positions supervised: all work / needed work (medians)")
    for variant in ("tiny_e2b", "tiny_e4b", "tiny_31b"):
        config = Gemma4Config.from_name(f"gemma4_{variant}")
        model = Gemma4(config)
        model.init_weights(torch.Generator().manual_seed(0))
        tokens = torch.randint(3, config.vocab_size, (2, 512))
        for share in (0.3, 0.1):
            keep = torch.zeros(2, 512, dtype=torch.bool)
            keep[:, -int(512 * share) :] = True

            def step(skip: bool, model: Gemma4 = model, tokens: Tensor = tokens, keep: Tensor = keep) -> None:
                hidden = model(tokens, supervised=keep) if skip else model(tokens)[keep]
                labels = tokens.roll(-1, 1)[keep]
                linear_cross_entropy(hidden, model.head_weight, labels, softcap=SOFTCAP).total.backward()

            needed, everything = side_by_side((lambda: step(True), lambda: step(False)), rounds)
            print(
                f"{variant:>9} {share:.0%} supervised: {everything:.3f} s / {needed:.3f} s = {everything / needed:.2f}x"
            )


COUNTED = {"attention": attention, "supervised": supervised}
ONCE = {"loss": loss, "memory": memory, "load": load}


@dataclass
class Options:
    """Arguments of `gemwright benchmark`."""

    what: list[str] = field(metadata={"choices": (*COUNTED, *ONCE)})
    rounds: int = 5


def benchmark(options: Options) -> None:
    """Run the benchmarks that were named, in order."""
    for name in options.what:
        if name in ONCE:
            ONCE[name]()
        else:
            COUNTED[name](options.rounds)


def main() -> None:
    """Run the command line's benchmarks."""
    run(Options, benchmark, __doc__, "what")


if __name__ == "__main__":
    main()
