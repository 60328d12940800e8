"""How many bytes a rank holds: what stays over a step, and what comes on top of it at the step's narrowest moments.

Weights, gradients and optimizer state are counted from the model's own parameters and the mesh. What a layer and the
loss need is found by running them forward and backward on tensors without storage, at the real size: the numbers are
those of the code that runs, whatever it is changed to. Media are left out, and so is what lies outside of tensors:
about 1.5 GB on a GPU, for its context, NCCL and kernels.

Letters of this file: a the bytes of a number in masters, gradients and sums, b those of a number in the computation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from model import Gemma4, Gemma4Config
from model.attention import KeyValue
from model.config import LayerConfig
from model.decoder import AttentionInputs
from model.head import Tiles, linear_cross_entropy
from model.masks import AttentionMask, attention_mask
from model.moe import Experts
from model.precision import accumulation_dtype
from model.rope import RotaryTable, rotary_table
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.layout import Layout
from parallel.options import PlanConfig
from parallel.pipeline.layout import cut_layers, num_stages
from parallel.tensor.plan import Split, split_of
from parallel.torch_private import TorchDispatchMode, tree_iter
from train.moments import bytes_a_number
from train.muon import is_orthogonalised
from train.resolve import Resolved

META = torch.device("meta")
GB = 10**9
OUTSIDE = 1.5 * 2**30
"""Bytes that a GPU's context, NCCL and kernels take beside tensors."""
SPARE = 0.08
"""What is left of a card's memory for fragments."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank's tensors by what they are: `held` over all steps, `moments` of a step with what comes on top."""

    held: dict[str, int]
    moments: dict[str, dict[str, int]]
    on_host: int = 0
    """What `parallel.cpu_offload` keeps in the memory of the host instead."""

    @property
    def narrowest(self) -> str:
        """The moment that has most on top."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return sum(self.held.values()) + sum(self.moments[self.narrowest].values())

    def lines(self) -> Iterator[str]:
        """What it says, in GB."""
        yield "held throughout: " + " | ".join(f"{name} {size / GB:.1f}" for name, size in self.held.items())
        if self.on_host:
            yield f"kept by the host: {self.on_host / GB:.1f} a rank"
        parts = self.moments[self.narrowest]
        named = " | ".join(f"{name} {size / GB:.1f}" for name, size in parts.items() if size)
        yield f"on top, at most, in the {self.narrowest}: {named}"
        yield f"peak {self.peak / GB:.1f} GB a rank"


@dataclass(frozen=True)
class Step:
    """What of a run decides how much a step takes."""

    micro_batch_size: int
    sequence_length: int
    micro_batches: int
    compute_dtype: torch.dtype
    device_type: str = "cuda"
    gradient_sync: str = "last"
    optimizer: str = "adamw"
    state_dtype: str = "float32"
    frozen: tuple[str, ...] = ()


def capacity(card: float) -> float:
    """Bytes that tensors may take of a card's."""
    return card * (1 - SPARE) - OUTSIDE


def footprint(config: Gemma4Config, layout: Layout, plans: PlanConfig, step: Step) -> Footprint:
    """The footprint of the rank that holds most, of those that hold a pipeline's stages."""
    return _most(_Traced(config, layout, plans, step), layout)


def footprint_of(run: Resolved, dtype: torch.dtype, device_type: str) -> Footprint:
    """The footprint of a run."""
    return footprint(run.model, run.layout, run.config, step_of(run, dtype, device_type))


def step_of(run: Resolved, dtype: torch.dtype, device_type: str) -> Step:
    """What of a run decides how much a step takes."""
    train, parallel = run.config.train, run.config.parallel
    micro_batches = train.global_batch_size // (run.layout.dp * run.micro_batch_size)
    return Step(
        run.micro_batch_size,
        run.config.data.sequence_length,
        micro_batches,
        dtype,
        device_type,
        parallel.gradient_sync,
        run.config.optimizer.name,
        run.config.optimizer.state_dtype,
        run.frozen,
    )


def smallest_sharding(run: Resolved, step: Step, capacity: float) -> tuple[Layout, Footprint] | None:
    """The least `dp_shard`, a power of two up to 1,024, by which a rank's peak is within `capacity` bytes."""
    traced = _Traced(run.model, run.layout, run.config, step)
    for exponent in range(11):
        layout = replace(run.layout, dp_shard=2**exponent)
        if layout.sharding % layout.ep == 0 and (found := _most(traced, layout)).peak <= capacity:
            return layout, found
    return None


def _most(traced: _Traced, layout: Layout) -> Footprint:
    parallel, config = traced.plans.parallel, traced.config
    stages = num_stages(parallel.pp_schedule, parallel.pp_virtual, layout.pp)
    length = traced.step.sequence_length
    spans = cut_layers(config, length, stages) if layout.pp > 1 else [range(config.num_hidden_layers)]
    found = [_of_rank(traced, layout, spans[rank :: layout.pp], rank) for rank in range(layout.pp)]
    return max(found, key=lambda rank: rank.peak)


def _of_rank(traced: _Traced, layout: Layout, spans: list[range], rank: int) -> Footprint:
    config, step = traced.config, traced.step
    a, b = traced.a, step.compute_dtype.itemsize
    layers = [index for span in spans for index in span]
    has_first, has_head = layers[0] == 0, layers[-1] == config.num_hidden_layers - 1
    held, whole, root = dict.fromkeys(("weights", "gradients", "optimizer"), 0), 0, 0
    for name, parameter in traced.parameters.items():
        of_layer = _layer_of(name)
        if of_layer is not None and of_layer not in layers:
            continue
        if (
            of_layer is None
            and not has_first
            and not (has_head and ("embed_tokens.weight" in name or ".norm." in name))
        ):
            continue
        mine = -(-parameter.numel() // layout.sharding)
        is_trained = not name.startswith(tuple(f"{module}." for module in step.frozen))
        numbers = 1 if step.optimizer == "muon" and is_orthogonalised(name, parameter) else 2
        held["weights"] += a * mine
        held["gradients"] += a * mine * is_trained
        held["optimizer"] += int(bytes_a_number(parameter, step.state_dtype, a) * mine * numbers * is_trained)
        rows_stay = "embed_tokens_per_layer" in name or (not has_head and layout.tp == 1 and "embed_tokens" in name)
        if not rows_stay:
            here = parameter.numel() // traced.parts(name)
            whole += here * is_trained
            root += here * (of_layer is None and name.startswith("language_model."))
    on_host = sum(held.values()) if traced.plans.parallel.cpu_offload else 0
    if on_host:
        held = dict.fromkeys(held, 0)

    def reduced(numbers: int) -> int:
        # Where gradients are widened as they are copied, FSDP keeps the narrow ones beside the wide sum.
        return a * numbers + (a * numbers // layout.sharding if b < a else 0)

    in_flight = layout.pp - rank if layout.pp > 1 else 1
    in_flight = max(in_flight, len(spans) * layout.pp if len(spans) > 1 else 0)
    keeps_whole = layout.pp > 1 or (step.gradient_sync == "last" and step.micro_batches > 1)
    always = {"gathered table": b * root, "whole gradients": a * whole if keeps_whole else 0}
    kept = [traced.layer(index).kept for index in layers]
    inputs = in_flight * (sum(kept) + (traced.embedded if has_first else 0))
    moments = {}
    for at, index in enumerate(layers):
        layer, later = traced.layer(index), at + 1 < len(layers)
        moments[f"backward of layer {index}"] = {
            **always,
            "kept for the backward": inputs - sum(kept[at + 1 :]),
            "layer": layer.peak,
            "its weights and the next's": 2 * b * layer.weights,
            "gradients of the one after it, reduced": reduced(traced.layer(layers[at + 1]).weights if later else 0),
            "gradient of the table": b * root * has_head,
        }
    if has_head:
        moments["loss"] = {**always, "kept for the backward": inputs, "loss": traced.loss}
    # Two gradients of the table, as head and as embedding, are added up, and the sum then reduced.
    moments["gradient of the table"] = {**always, "gradient of the table": max(2 * b * root, b * root + reduced(root))}
    return Footprint(held, moments, on_host)


@dataclass(frozen=True)
class _Layer:
    kept: int
    """From its forward to its backward, its input among it."""
    peak: int
    """On top of that while it is computed, forward or again and backward; gradients of its weights are part of it."""
    weights: int
    """Numbers of its weights on a rank once they are gathered."""


class _Traced:
    """What the parts of a model take on one rank, each found once."""

    def __init__(self, config: Gemma4Config, layout: Layout, plans: PlanConfig, step: Step) -> None:
        self.config, self.layout, self.plans, self.step = config, layout, plans, step
        self.a = accumulation_dtype(step.compute_dtype).itemsize
        self.tokens = step.micro_batch_size * step.sequence_length // layout.cp
        self.local = _local(config, layout)
        with META:
            self.parameters = dict(Gemma4(config).named_parameters())
        self.numbers: dict[int, int] = {}
        for name, parameter in self.parameters.items():
            index = _layer_of(name)
            if index is not None:
                self.numbers[index] = self.numbers.get(index, 0) + parameter.numel() // self.parts(name)
        self._layers: dict[Any, _Layer] = {}
        self.embedded, self.loss = self._embedded(), self._loss()

    def parts(self, name: str) -> int:
        """Ranks among which a parameter is split besides FSDP."""
        _, is_layer, inside = name.partition(".layers.")
        if ".experts." in name:
            return self.layout.ep
        if is_layer and name.startswith("language_model."):
            split = split_of(inside.partition(".")[2].rpartition(".")[0] or inside.partition(".")[2])
            return self.layout.tp if split in (Split.OUTPUTS, Split.INPUTS, Split.KV_HEADS) else 1
        return self.layout.tp if "embed_tokens.weight" in name else 1

    def layer(self, index: int) -> _Layer:
        """A layer's bytes; layers of one kind are alike."""
        spec = self.config.layer(index)
        kind = replace(spec, index=0, kv_source=int(spec.is_kv_consumer))
        key = (kind, self.numbers[index], index % self.plans.activation_checkpoint.every)
        if key not in self._layers:
            self._layers[key] = self._trace(index, spec)
        return self._layers[key]

    def _trace(self, index: int, spec: LayerConfig) -> _Layer:
        config, dtype = self.local, self.step.compute_dtype
        with META:
            model = Gemma4(config, range(index, index + 1)).to(dtype)
        if model.layers[0].has_experts:
            cast(Experts, model.layers[0].experts).grouped_mm = _grouped_mm
        apply_activation_checkpoint(model, self.plans.activation_checkpoint)
        x_TD = self._tensor(config.hidden_size)
        width = config.hidden_size_per_layer_input
        of_layer = self._tensor(width) if width else None
        batch, length = self.step.micro_batch_size, self.step.sequence_length // self.layout.cp
        window = config.sliding_window if spec.type == "sliding_attention" else None
        mask = self._mask(attention_mask(batch, length, window=window))
        table = rotary_table(config, spec.type, torch.arange(self.tokens) % length, dtype)
        rope = RotaryTable(table.cos.to(META), table.sin.to(META))
        heads = config.layer(index).num_kv_heads
        shared = KeyValue(*(self._tensor(heads, spec.head_dim) for _ in "kv")) if spec.is_kv_consumer else None
        with Tracker() as tracker:
            out_TD, _ = model.layers[0](x_TD, of_layer, AttentionInputs(rope, rope, mask), shared)
            kept = tracker.now - out_TD.nbytes
            out_TD.backward(torch.empty_like(out_TD))
        split = self.layout.tp if self.layout.sequence_parallel else 1  # between blocks a rank has a run of tokens
        return _Layer(kept + x_TD.nbytes // split, tracker.peak - kept, self.numbers[index])

    def _mask(self, mask: AttentionMask) -> AttentionMask:
        moved = mask.to(META)  # with the blocks of a GPU
        if self.step.device_type == "cpu":
            vars(moved)["blocks"] = mask.blocks
        return moved

    def _embedded(self) -> int:
        """Hidden states and each layer's own inputs, as they go into the layers."""
        config, b = self.local, self.step.compute_dtype.itemsize
        own = config.hidden_size_per_layer_input * config.num_hidden_layers
        return self.tokens * b * (config.hidden_size + 3 * own)

    def _loss(self) -> int:
        vocabulary = -(-self.config.vocab_size // self.layout.tp)
        tiles = Tiles.default(torch.device(self.step.device_type), vocabulary)
        hidden_TD = self._tensor(self.config.hidden_size)
        weight_VD = torch.empty(vocabulary, self.config.hidden_size, dtype=hidden_TD.dtype, device=META)
        labels_T = torch.empty(self.tokens, dtype=torch.long, device=META)
        with Tracker() as tracker:
            cap = self.config.final_logit_softcapping
            loss = linear_cross_entropy(hidden_TD, weight_VD.requires_grad_(), labels_T, softcap=cap, tiles=tiles)
            loss.total.backward()
        return tracker.peak

    def _tensor(self, *shape: int) -> Tensor:
        return torch.empty(self.tokens, *shape, dtype=self.step.compute_dtype, device=META, requires_grad=True)


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    """What has the sizes of a grouped product, which torch has on `meta` in bfloat16 alone."""
    return _GroupedSizes.apply(x, weight)


class _GroupedSizes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(len(x), weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Tracker(TorchDispatchMode):
    """Bytes of storages made while it is on: `now` those that are alive, `peak` the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, made=True)
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, tensors: Any, *, made: bool) -> None:
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._seen:
                self._add(tensor.untyped_storage(), made)

    def _add(self, storage: torch.UntypedStorage, made: bool) -> None:
        key, size = id(storage), storage.nbytes() if made else 0

        def gone(_: object) -> None:
            self.now -= size
            del self._seen[key]

        self.now += size
        self._seen[key] = weakref.ref(storage, gone)


def _local(config: Gemma4Config, layout: Layout) -> Gemma4Config:
    """What a rank has of each layer, as sizes of a model."""
    tp, changed = layout.tp, dict[str, Any](vision=None, audio=None)
    for name in ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "intermediate_size"):
        size = getattr(config, name)
        changed[name] = None if size is None else max(1, size // tp)
    if config.moe is not None:
        changed["num_experts"] = max(config.moe.num_experts // layout.ep, config.moe.top_k)
    return config.replace(**changed)


def _layer_of(name: str) -> int | None:
    """The decoder layer that a parameter is in."""
    prefix = "language_model.layers."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None
