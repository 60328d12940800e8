"""How the ranks of a run are laid out: sizes of the mesh axes, what is legal for a model, and the nearest that is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from model.config import ConfigError, Gemma4Config, divisors

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the slowest network to the fastest; neighbouring ranks differ in tp."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. `ep` splits experts over groups of `dp_shard * cp * tp` ranks and adds none of its own."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = True

    @property
    def world_size(self) -> int:
        """Ranks that the mesh needs: the product of its axes."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def dp(self) -> int:
        """Ranks, or groups of ranks, that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharding(self) -> int:
        """Ranks that split among them what no other plan splits."""
        return self.dp_shard * self.cp * self.tp

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def data_rank(self, rank: int) -> int:
        """Which of the `dp` shares of a batch a rank works on."""
        at = self.coordinate(rank)
        return at["dp_replicate"] * self.dp_shard + at["dp_shard"]

    def __str__(self) -> str:
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sequence_parallel"}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one rank"]
        return " x ".join(named) + (", sequence parallel" if self.tp > 1 and self.sequence_parallel else "")


def micro_batch_size(global_batch_size: int, wanted: int, num_ranks: int, multiple: int = 1) -> int:
    """Sequences a rank runs at once: the largest size up to `wanted` that divides its share.

    The number of micro-batches is a `multiple` if any size makes it so.

    Raises `ConfigError` if the global batch cannot be dealt evenly.
    """
    if global_batch_size % num_ranks:
        down, up = global_batch_size // num_ranks * num_ranks, -(-global_batch_size // num_ranks) * num_ranks
        near = up if down == 0 or up - global_batch_size < global_batch_size - down else down
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} does not divide among {num_ranks} data-parallel ranks; "
            f"nearest: {near}."
        )
    share = global_batch_size // num_ranks
    sizes = [size for size in range(1, min(wanted, share) + 1) if share % size == 0]
    return max((size for size in sizes if share // size % multiple == 0), default=max(sizes))


def resolve_layout(world_size: int, wanted: Layout, config: Gemma4Config, sequence_length: int) -> Layout:
    """The layout with `dp_shard` of -1 filled in. Raises `ConfigError` naming the nearest legal layout."""
    for axis in (*AXES, "ep"):
        size = getattr(wanted, axis)
        if size < 1 and not (axis == "dp_shard" and size == -1):
            extra = " (all ranks that are left)" if axis == "dp_shard" else ""
            raise ConfigError(f"parallel.{axis}={size} is no size; nearest: {-1 if extra else 1}{extra}.")
    asked = wanted
    if wanted.dp_shard == -1:
        rest = math.prod(getattr(wanted, axis) for axis in AXES if axis != "dp_shard")
        asked = replace(wanted, dp_shard=max(world_size // rest, 1))
    cause = _misfit(world_size, asked, wanted.dp_shard == -1) or problem(asked, config, sequence_length)
    if cause is None:
        return asked
    near = nearest_layout(world_size, asked, config, sequence_length, free=wanted.dp_shard == -1)
    advice = f"nearest legal: {_as_overrides(near, wanted)}" if near else f"no layout of {world_size} ranks is legal"
    raise ConfigError(f"{cause}; {advice}.")


def _misfit(world_size: int, layout: Layout, filled: bool) -> str | None:
    if layout.world_size == world_size:
        return None
    sizes = " x ".join(
        f"{axis}={getattr(layout, axis)}"
        for axis in AXES
        if (not filled if axis == "dp_shard" else getattr(layout, axis) > 1)
    )
    if filled:
        return f"parallel.{sizes or 'dp_shard=-1'} does not divide the {world_size} ranks of this run"
    return f"parallel.{sizes} is not the {world_size} ranks of this run"


def problem(layout: Layout, config: Gemma4Config, sequence_length: int) -> str | None:
    """Why this model cannot run on this layout, or None."""
    tp, cp, heads = layout.tp, layout.cp, config.num_attention_heads
    if heads % tp:
        return f"parallel.tp={tp} does not divide num_attention_heads={heads} (legal: {divisors(heads)})"
    for index in range(config.num_hidden_layers):
        layer = config.layer(index)
        if layer.num_kv_heads % tp and tp % layer.num_kv_heads:
            return (
                f"parallel.tp={tp} neither divides nor is a multiple of the {layer.num_kv_heads} KV heads "
                f"of layer {index}"
            )
    if config.intermediate_size % tp:
        return f"parallel.tp={tp} does not divide intermediate_size={config.intermediate_size}"
    if cp > 1 and sequence_length % (2 * cp):
        return (
            f"parallel.cp={cp} cuts a sequence into {2 * cp} pieces, which do not divide "
            f"data.sequence_length={sequence_length}"
        )
    if layout.sequence_parallel and tp > 1 and (sequence_length // cp) % tp:
        return (
            f"parallel.sequence_parallel with tp={tp} does not divide the {sequence_length // cp} positions of a "
            "sequence on each rank"
        )
    if layout.pp > config.num_hidden_layers:
        return f"parallel.pp={layout.pp} exceeds num_hidden_layers={config.num_hidden_layers}"
    uneven = _uneven_split(layout, config)
    if uneven is not None:
        return uneven
    if layout.ep == 1:
        return None
    if not config.enable_moe_block or config.num_experts is None:
        return f"parallel.ep={layout.ep}, but this model has no experts"
    if config.num_experts % layout.ep:
        return f"parallel.ep={layout.ep} does not divide num_experts={config.num_experts}"
    if layout.sharding % layout.ep:
        return f"parallel.ep={layout.ep} does not divide dp_shard x cp x tp={layout.sharding}"
    return _uneven_experts(layout, config)


def _uneven_split(layout: Layout, config: Gemma4Config) -> str | None:
    """Weights that tp splits by rows must shard evenly further, by rows or columns (`parallel.fsdp.even_axis`)."""
    tp, shards, D = layout.tp, layout.dp_shard * layout.cp, config.hidden_size
    if tp == 1 or D % shards == 0:
        return None
    layers = [config.layer(index) for index in range(config.num_hidden_layers)]
    rows = {config.vocab_size, *(layer.intermediate_size for layer in layers)}
    rows |= {config.num_attention_heads * layer.head_dim for layer in layers}
    rows |= {layer.num_kv_heads * layer.head_dim for layer in layers if layer.num_kv_heads % tp == 0}
    odd = [count for count in sorted(rows) if count % (tp * shards)]
    if not odd:
        return None
    return (
        f"a weight of {odd[0]} rows, split by parallel.tp={tp}, does not divide further among dp_shard x cp={shards} "
        f"ranks, and neither does hidden_size={D}"
    )


def _uneven_experts(layout: Layout, config: Gemma4Config) -> str | None:
    """The same for experts, which ep splits."""
    assert config.num_experts and config.moe_intermediate_size
    shards = layout.sharding // layout.ep
    if config.num_experts % (layout.ep * shards) == 0:
        return None
    for name, size in (
        ("hidden_size", config.hidden_size),
        ("2 x moe_intermediate_size", 2 * config.moe_intermediate_size),
    ):
        if size % shards:
            return (
                f"experts split by parallel.ep={layout.ep} do not divide further among {shards} ranks, and neither "
                f"does {name}={size}"
            )
    return None


def nearest_layout(
    world_size: int, wanted: Layout, config: Gemma4Config, sequence_length: int, *, free: bool
) -> Layout | None:
    """The legal layout of `world_size` ranks whose sizes differ least in ratio; `free`: dp_shard may be anything."""

    def distance(layout: Layout) -> tuple[float, float]:
        axes = [axis for axis in (*AXES, "ep") if not (free and axis == "dp_shard")]
        ratios = sum(abs(math.log2(getattr(layout, axis) / getattr(wanted, axis))) for axis in axes)
        return ratios + 0.5 * (layout.sequence_parallel != wanted.sequence_parallel), -layout.dp_shard

    legal = (layout for layout in _layouts(world_size, wanted) if problem(layout, config, sequence_length) is None)
    return min(legal, key=distance, default=None)


def _layouts(world_size: int, wanted: Layout) -> Iterator[Layout]:
    for sizes in _factorisations(world_size, len(AXES)):
        base = replace(wanted, **dict(zip(AXES, sizes, strict=True)))  # type: ignore[arg-type]
        for ep in dict.fromkeys((wanted.ep, 1, *(d for d in range(2, base.sharding + 1) if base.sharding % d == 0))):
            for sequence_parallel in dict.fromkeys((wanted.sequence_parallel, False)):
                yield replace(base, ep=ep, sequence_parallel=sequence_parallel)


def _factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for size in range(1, n + 1):
        if n % size == 0:
            for rest in _factorisations(n // size, parts - 1):
                yield (size, *rest)


def _as_overrides(layout: Layout, wanted: Layout) -> str:
    """What to write on the command line for it: every axis that was asked for or is not 1."""
    default = Layout(dp_shard=-1)
    written = []
    for field in fields(Layout):
        value, asked = getattr(layout, field.name), getattr(wanted, field.name)
        if field.name == "dp_shard" and asked == -1:
            continue  # it fills in by itself
        if value != getattr(default, field.name) or asked != getattr(default, field.name):
            written.append(f"parallel.{field.name}={str(value).lower()}")
    return " ".join(written) or "none of these"
