"""Mesh parity of cases drawn at random among the legal ones.

    python -m tests.sweep --seed 0 --count 100     # draws 0:0 to 0:99
    python -m tests.sweep --seed 0 --only 17       # one of them again
    python -m tests.sweep --dtype float32          # in float32, with its bounds
    python -m tests.sweep --with optimizer.name=muon --with parallel.cpu_offload=true    # these in every draw

Each draws a variant with sizes, a mesh of 2, 4 or 8 ranks, a batch of packed documents and options,
trains a few steps, and compares loss, gradient norm and every gradient with one process.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

from model import ConfigError
from parallel.layout import AXES, Layout, problem
from tests.harness.meshes import VARIANTS, Case, check, run, sensitivity


def draw_case(seed: str, dtype: torch.dtype = torch.float64) -> Case:
    """A legal case; a function of the seed and dtype alone."""
    draw = random.Random(seed)
    while True:
        variant = draw.choice(VARIANTS)
        model = _draw_model(draw, variant, dtype)
        case = replace(model, layout=_draw_layout(draw, variant), options=_draw_options(draw))
        try:
            check(case)
            if problem(case.layout, case.config, case.length) is None:
                return case
        except ConfigError:
            continue


def _draw_model(draw: random.Random, variant: str, dtype: torch.dtype) -> Case:
    shared = variant in ("e2b", "e4b")
    pattern = draw.choice((2, 3))
    layers = draw.choice((4, 6, 7, 8))
    kv_heads = {"e2b": 1, "e4b": 2}.get(variant, draw.choice((2, 4)))
    sizes: dict[str, Any] = {
        "vocab_size": draw.choice((64, 150, 201)),
        "hidden_size": draw.choice((32, 48)),
        "intermediate_size": draw.choice((32, 64)),
        "num_hidden_layers": layers,
        "sliding_window_pattern": pattern,
        "sliding_window": draw.choice((3, 8, 20, 64)),
        "num_attention_heads": draw.choice((4, 8)),
        "num_key_value_heads": kv_heads,
    }
    sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]
    if shared:
        sizes["num_kv_shared_layers"] = draw.randint(1, layers - pattern)
    else:
        sizes["num_global_key_value_heads"] = draw.choice((1, 2))
    if variant == "26b_a4b":
        experts = draw.choice((4, 8))
        # In float32 rounding may swap two near-equal experts, so every one is chosen.
        chosen = draw.choice((1, 2, 3, experts)) if dtype == torch.float64 else experts
        sizes |= {"num_experts": experts, "top_k_experts": chosen}
    return Case(
        variant,
        sizes=tuple(sizes.items()),
        batch_size=draw.choice((8, 16)),
        micro_batch_size=draw.choice((1, 2, 4)),
        length=draw.choice((16, 32, 48)),
        steps=2,
        seed=draw.getrandbits(16),
        dtype=dtype,
    )


def _draw_layout(draw: random.Random, variant: str) -> Layout:
    ranks = draw.choice((2, 4, 4, 8))
    sizes = dict.fromkeys(AXES, 1)
    for _ in range(ranks.bit_length() - 1):
        sizes[draw.choice(AXES)] *= 2
    layout = Layout(**sizes, sequence_parallel=draw.random() < 0.6)
    legal = [ep for ep in (1, 2, 4, 8) if layout.sharding % ep == 0]
    return replace(layout, ep=draw.choice(legal) if variant == "26b_a4b" else 1)


def _draw_options(draw: random.Random) -> tuple[tuple[str, Any], ...]:
    return (
        ("activation_checkpoint.mode", draw.choice(("none", "none", "full", "selective"))),
        ("activation_checkpoint.every", draw.choice((1, 2))),
        ("parallel.reshard_after_forward", draw.random() < 0.7),
        ("parallel.pp_schedule", draw.choice(("1f1b", "interleaved", "zero_bubble"))),
        ("parallel.pp_virtual", 2),
    )


def with_options(case: Case, words: list[str]) -> Case:
    """The case with some options as these KEY=VALUE texts say."""
    fields = {
        "optimizer.name": "optimizer",
        "optimizer.state_dtype": "state_dtype",
        "parallel.gradient_sync": "gradient_sync",
    }
    for word in words:
        key, _, text = word.partition("=")
        if key in fields:
            change: dict[str, Any] = {fields[key]: text}
            case = replace(case, **change)
        else:
            value = {"true": True, "false": False}.get(text, text)
            case = replace(case, options=tuple((dict(case.options) | {key: value}).items()))
    return case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--only", type=int, default=None, help="run this draw alone")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--with", dest="words", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    draws = range(arguments.count) if arguments.only is None else [arguments.only]
    failed = []
    for index in draws:
        case, started = draw_case(f"{arguments.seed}:{index}", getattr(torch, arguments.dtype)), time.perf_counter()
        case = with_options(case, arguments.words)
        try:
            found = run(case)
            good = found.within(case.dtype)
            result = f"loss {found.loss:.1e} norm {found.norm:.1e} gradient {found.gradient:.1e} {found.worst}"
            if not good and case.dtype == torch.float64 and replace(found, gradient=0.0).within(case.dtype):
                moved = sensitivity(case, found.worst)
                good = found.gradient < 3 * moved
                result += f", which moves by {moved:.1e} where the last bit of the weights of one process does"
        except AssertionError as error:
            good, result = False, str(error).strip().splitlines()[-1]
        if not good:
            failed.append(index)
        options = {
            name: value for name, value in case.options if not name.startswith("parallel.pp_") or case.layout.pp > 1
        }
        print(
            f"{'ok  ' if good else 'FAIL'} {arguments.seed}:{index:<3} {case.variant:8} {case.layout} | {options} | "
            f"{result} | {time.perf_counter() - started:.1f} s",
            flush=True,
        )
    print(f"{len(draws) - len(failed)} of {len(draws)} pass" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
