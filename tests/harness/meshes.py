"""One case of mesh parity: a small model trained for a few steps on a mesh, held against one process without plans."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.checkpointer.utils import canonical_fqn

from data.batch import IGNORE, Batch, Row, collate
from model import ConfigError, Gemma4, Gemma4Config
from model.init import Fill, Slice, random_fill, whole_slices
from parallel.apply import build_parallel_model
from parallel.grad_norm import num_holders
from parallel.layout import Layout, micro_batch_size, resolve_layout
from parallel.mesh import Mesh, build_mesh
from parallel.options import PlanConfig
from parallel.pipeline.layout import check_pipeline
from parallel.world import World
from tests.harness.compare import hold, relative_error
from tests.harness.distributed import run_ranks
from train.config import OptimizerConfig
from train.engine import Engine
from train.objective import CrossEntropy, cross_entropy
from train.optimizer import build_optimizer

CPU = torch.device("cpu")
VARIANTS = ("e2b", "e4b", "12b", "26b_a4b", "31b")
SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "vocab_size_per_layer_input": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "sliding_window_pattern": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 12,
    "vision": None,
    "audio": None,
}
MAX_GRAD_NORM = 0.5
LEARNING_RATES = {torch.float64: 1e-2, torch.float32: 1e-4}
"""AdamW makes a whole step of the rounding of a near-zero gradient, so in float32 steps are small."""
ONE_RANK = Layout()


@dataclass(frozen=True)
class Case:
    """What is run; everything in it is hashable, so that cases share their reference."""

    variant: str
    layout: Layout = ONE_RANK
    options: tuple[tuple[str, Any], ...] = ()
    """Keys of `parallel.options.PlanConfig` and their values."""
    sizes: tuple[tuple[str, Any], ...] = ()
    """Fields of the model that differ from `SMALL`."""
    batch_size: int = 8
    micro_batch_size: int = 8
    """Most sequences a rank runs at once."""
    length: int = 32
    steps: int = 5
    seed: int = 0
    dtype: torch.dtype = torch.float64
    gradient_sync: str = "last"
    optimizer: str = "adamw"
    state_dtype: str = "float32"

    @property
    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(self.optimizer, self.state_dtype, lr=LEARNING_RATES[self.dtype])

    @property
    def config(self) -> Gemma4Config:
        shared = {"num_kv_shared_layers": 2} if self.variant in ("e2b", "e4b") else {}
        # Routing is a choice: rounding that swaps two near-equal experts changes a token's output at once. In float64
        # none are that near; in float32 every expert is chosen over several steps, so that only sums may differ.
        every = self.steps > 1 and self.dtype == torch.float32
        experts = {"moe_intermediate_size": 16, "num_experts": 8, "top_k_experts": 8 if every else 3}
        own = {"26b_a4b": experts, "31b": {"num_global_key_value_heads": 4}}.get(self.variant, {})
        return Gemma4Config.from_name(f"tiny_{self.variant}", **(SMALL | shared | own | dict(self.sizes)))

    @property
    def reference_key(self) -> Case:
        return replace(self, layout=ONE_RANK, options=(), micro_batch_size=0, gradient_sync="last")


@dataclass(frozen=True)
class Run:
    """Each step's loss and gradient norm before clipping; the first and last step's gradients with their bounds."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    bounds: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Errors:
    """Largest relative differences to one process; of gradients that of `worst`, which comes nearest to its bound."""

    loss: float
    norm: float
    gradient: float
    worst: str = ""
    bound: float = 0.0

    def within(self, dtype: torch.dtype) -> bool:
        most = SUMS_WITHIN[dtype]
        return self.loss < most and self.norm < most and self.gradient < self.bound

    def hold(self, kind: str, dtype: torch.dtype, *where: object) -> None:
        kind = f"{kind}, {str(dtype).removeprefix('torch.')}"
        hold(f"{kind}: loss", self.loss, SUMS_WITHIN[dtype], where)
        hold(f"{kind}: gradient norm", self.norm, SUMS_WITHIN[dtype], where)
        hold(f"{kind}: gradients", self.gradient, self.bound, (*where, self.worst))


def plans(options: Mapping[str, Any]) -> PlanConfig:
    """Plans with values for some dotted keys."""
    found = PlanConfig()
    for key, value in options.items():
        section, name = key.split(".")
        assert hasattr(getattr(found, section), name), key
        setattr(getattr(found, section), name, value)
    return found


def check(case: Case) -> None:
    """Raises `ConfigError` where the pipeline of a case cannot run."""
    layout, options = case.layout, dict(case.options)
    if case.batch_size % layout.dp:
        raise ConfigError(f"{case.batch_size} sequences for {layout.dp} ranks")
    if layout.pp > 1:
        count = (
            case.batch_size
            // layout.dp
            // micro_batch_size(case.batch_size, case.micro_batch_size, layout.dp, layout.pp)
        )
        check_pipeline(
            options.get("parallel.pp_schedule", "1f1b"),
            options.get("parallel.pp_virtual", 2),
            layout.pp,
            case.config.num_hidden_layers,
            count,
        )


SUMS_WITHIN = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Bound of loss and gradient norm at each step."""
GRADIENTS_WITHIN = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Bound of every gradient; in float32 three times one process's own distance to float64, where that is more."""


def run(case: Case) -> Errors:
    """The worst of all ranks."""
    return run_all([case])[0]


def run_all(cases: Sequence[Case]) -> list[Errors]:
    """Cases on the same number of ranks, one after the other, for one start of them."""
    if any(dict(case.options).get("activation_checkpoint.mode", "none") != "none" for case in cases):
        import torchtitan.distributed.activation_checkpoint  # noqa: F401  once here, not in every rank
    expected = [reference(case.reference_key) for case in cases]
    (ranks,) = {case.layout.world_size for case in cases}

    def on_rank(world: World) -> list[Errors]:
        return [train(case, world, run) for case, run in zip(cases, expected, strict=True)]

    return [worst_of(errors) for errors in zip(*run_ranks(ranks, on_rank), strict=True)]


def worst_of(errors: Sequence[Errors]) -> Errors:
    """The largest of several ranks."""
    nearest = max(errors, key=lambda e: e.gradient / e.bound)
    return replace(nearest, loss=max(e.loss for e in errors), norm=max(e.norm for e in errors))


def sequences(case: Case, step: int) -> list[Row]:
    """The sequences of a step: packed documents of uneven length, spans without labels, one without any."""
    draw = random.Random(f"{case.seed}/{step}")
    vocab, length = case.config.vocab_size, case.length
    tokens = torch.randint(
        3, vocab, (case.batch_size, length), generator=torch.Generator().manual_seed(draw.getrandbits(32))
    )
    labels, positions, documents = tokens.roll(-1, 1), torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row in range(case.batch_size):
        start = 0
        while start < length:
            end = min(length, start + draw.choice((1, 3, length // 4, length // 2, length)))
            positions[row, start:end] = torch.arange(end - start)
            documents[row, start:end] = start
            labels[row, end - 1] = IGNORE
            hidden = draw.choice((0, 0, 2, end - start))
            labels[row, start : start + hidden] = IGNORE
            start = end
    labels[draw.randrange(case.batch_size)] = IGNORE
    return [Row(*parts) for parts in zip(tokens, labels, positions, documents, strict=True)]


def whole_batch(case: Case, step: int) -> Batch:
    """All sequences of a step in one batch."""
    return collate(sequences(case, step), case.config)


def initial_values(seed: int) -> Fill:
    """Matrices larger than a real start has, so that five steps matter and every part has a gradient.

    Vectors are off their initial values, and queries as long as in a trained model: at a start they make scores whose
    standard deviation is the square root of the head width, and attention that sharp makes much of every rounding.
    """
    drawn = random_fill(seed + 1, 0.1, 0)

    def fill(slices: list[Slice]) -> None:
        drawn(slices)
        for part in slices:
            if len(part.shape) == 1:
                place = torch.arange(part.offset[0], part.offset[0] + len(part.local))
                scale = part.shape[0] ** -0.5 if part.name.endswith("q_norm.weight") else 1.0
                part.local.detach().copy_(scale * (1 + 0.3 * torch.sin(2.4 * place + len(part.name))))

    return fill


@cache
def reference(case: Case) -> Run:
    """The plain model, batch by batch whole, with torch's own clipping. Give it a `reference_key`."""
    run, within = _reference(case, case.dtype), GRADIENTS_WITHIN[case.dtype]
    exact = run if case.dtype == torch.float64 else _reference(case, torch.float64)
    for found, truth in zip(run.gradients, exact.gradients, strict=True):
        run.bounds.append({name: max(within, 3 * relative_error(found[name], truth[name])) for name in found})
    return run


def sensitivity(case: Case, name: str) -> float:
    """How much a gradient of one process moves, relative to its norm, where the last bit of its weights does.

    A gradient that is zero, such as that of a router which chooses one expert, is rounding and nothing else; and AdamW
    makes a whole step of what is nearly zero.
    """
    key = replace(case.reference_key, dtype=torch.float64)
    exact, moved = reference(key), [_reference(key, torch.float64, last_bits=seed) for seed in (1, 2)]
    return max(
        relative_error(found[name], truth[name])
        for run in moved
        for found, truth in zip(run.gradients, exact.gradients, strict=True)
    )


def _reference(case: Case, dtype: torch.dtype, last_bits: int = 0) -> Run:
    torch.manual_seed(0)
    model = Gemma4(case.config).to(dtype)
    initial_values(case.seed)(whole_slices(model))
    if last_bits:
        torch.manual_seed(last_bits)
        for parameter in model.parameters():
            parameter.data.mul_(1 + torch.finfo(dtype).eps * torch.randint(-1, 2, parameter.shape, dtype=dtype))
    optimizer = build_optimizer(model, case.optimizer_config)
    run = Run()
    for step in range(case.steps):
        batch = whole_batch(case, step)
        loss = cross_entropy(model, batch)
        (loss.total / loss.count).backward()
        run.losses.append(float(loss.nll / loss.count))
        if step in (0, case.steps - 1):
            run.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        run.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return run


def train(case: Case, world: World, expected: Run) -> Errors:
    """The same on this rank of the case's mesh, each gradient compared as soon as it is whole."""
    layout = resolve_layout(world.size, case.layout, case.config, case.length)
    mesh = mesh_of(layout)
    parallel = build_parallel_model(
        case.config,
        mesh,
        CPU,
        initial_values(case.seed),
        plans(dict(case.options)),
        compute_dtype=case.dtype,
        sequence_length=case.length,
    )
    optimizer = build_optimizer(parallel.model, case.optimizer_config, mesh.shards)
    engine = Engine(parallel, CrossEntropy(), CPU, case.gradient_sync)
    found = Errors(0.0, 0.0, 0.0, bound=GRADIENTS_WITHIN[case.dtype])
    for step in range(case.steps):
        supervised = whole_batch(case, step).kept.count
        sums = engine.forward_backward(share_of(case, step, layout, world.rank), supervised)
        assert sums is not None
        total = sums["loss"].double()
        dist.all_reduce(total)
        loss_error, worst = abs(float(total) / supervised / expected.losses[step] - 1), found
        if step in (0, case.steps - 1):
            index = 0 if step == 0 else -1
            errors, bounds = gradient_errors(parallel.model, expected.gradients[index]), expected.bounds[index]
            name = max(errors, key=lambda n: errors[n] / bounds[n])
            worst = Errors(0.0, 0.0, errors[name], name, bounds[name])
        norm = engine.clip(MAX_GRAD_NORM)
        step_errors = replace(worst, loss=loss_error, norm=abs(norm / expected.norms[step] - 1))
        found = worst_of((found, step_errors))
        optimizer.step()
        optimizer.zero_grad()
    return found


@cache
def mesh_of(layout: Layout) -> Mesh:
    """One set of process groups for all cases of a rank that have this layout."""
    return build_mesh(CPU, layout)


def share_of(case: Case, step: int, layout: Layout, rank: int) -> list[Batch]:
    """The micro-batches of a data-parallel rank."""
    size = case.batch_size // layout.dp
    micro = micro_batch_size(case.batch_size, case.micro_batch_size, layout.dp, layout.pp)
    start, rows = layout.data_rank(rank) * size, sequences(case, step)
    return [collate(rows[i : i + micro], case.config) for i in range(start, start + size, micro)]


def whole_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every gradient, gathered on every rank."""
    return {
        canonical_fqn(name): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def gradient_errors(model: torch.nn.Module, expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every gradient; each rank compares the parts it holds, and one exchange adds them up."""
    names = sorted(expected)
    sums = torch.zeros(len(names), dtype=torch.float64)
    seen = torch.zeros(len(names), dtype=torch.float64)
    for dotted, parameter in model.named_parameters():
        grad = parameter.grad
        assert isinstance(grad, DTensor), dotted
        index = names.index(canonical_fqn(dotted))
        shape, offset = compute_local_shape_and_global_offset(grad.shape, grad.device_mesh, grad.placements)
        part = expected[names[index]][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        error, holders = grad.to_local().double() - part.double(), num_holders(grad)
        sums[index] += error.square().sum() / holders
        seen[index] += part.numel() / holders
    both = torch.stack((sums, seen))
    dist.all_reduce(both)
    found = {}
    for name, square, count in zip(names, *both.tolist(), strict=True):
        copies = count / expected[name].numel()  # the tied table is on two stages
        assert copies > 0.5 and abs(copies - round(copies)) < 1e-6, f"{name} is held {copies} times"
        found[name] = math.sqrt(square / copies) / float(expected[name].double().norm().clamp_min(1e-30))
    return found
