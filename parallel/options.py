"""The sections of a config that say what is laid over a model. A section is the option: plans read it as it is.

An option is one field here, with its default, its bounds and its meaning, and the plan that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from parallel.pipeline.layout import SCHEDULES


def one_of(default: Any, *choices: str) -> Any:
    """A field that takes these texts alone, or none where that is its default."""
    return field(default=default, metadata={"choices": choices})


def at_least(default: Any, least: float) -> Any:
    """A field that takes no smaller number, or none where that is its default."""
    return field(default=default, metadata={"least": least})


@dataclass
class ParallelConfig:
    """Sizes of the mesh's axes, and how FSDP and pipelines behave on it."""

    pp: int = 1
    """Pipeline stages, one or more on each rank."""
    pp_schedule: str = one_of("1f1b", *SCHEDULES)
    """1f1b | interleaved | zero_bubble"""
    pp_virtual: int = at_least(2, 2)
    """Stages on each rank, for interleaved and zero_bubble."""
    dp_replicate: int = 1
    dp_shard: int = -1
    """Ranks that see different sequences and shard parameters among them; -1 takes all that are left."""
    cp: int = 1
    """Ranks that share each sequence."""
    tp: int = 1
    """Ranks that share heads, feed-forward columns and vocabulary."""
    sequence_parallel: bool = True
    """With tp, tokens are split among its ranks between blocks."""
    ep: int = 1
    """Ranks, of dp_shard x cp x tp, that share the experts."""
    reshard_after_forward: bool = True
    gradient_sync: str = one_of("last", "last", "every")
    """last: reduce once a step, whole gradients kept meanwhile | every: reduce each micro-batch, in less memory"""
    cpu_offload: bool = False
    kernels: str = one_of("auto", "auto", "torch", "triton")
    """auto (on a GPU Triton's, where it is installed) | torch | triton"""


@dataclass
class ActivationCheckpointConfig:
    """What is computed again in the backward rather than kept."""

    mode: str = one_of("none", "none", "full", "selective")
    """none | full (recompute whole layers) | selective (keep attention and every second product, recompute the rest)"""
    every: int = at_least(1, 1)
    """Recompute in every n-th layer; the others keep all."""


@dataclass
class Float8Config:
    """Products in 8-bit floating point."""

    recipe: str = one_of("none", "none", "tensorwise", "rowwise")
    """none | tensorwise | rowwise: products of the decoder's linear layers, by torchao, and of experts"""


@dataclass
class MoEConfig:
    """Losses that keep the router of a mixture of experts balanced."""

    balance_loss: float = at_least(0.0, 0)
    """Coefficient of the loss that evens out the experts' load."""
    router_z_loss: float = at_least(0.0, 0)
    """Coefficient of the router's mean squared log-sum-exp."""


@dataclass
class PlanConfig:
    """The sections above, as `build_parallel_model` takes them."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    float8: Float8Config = field(default_factory=Float8Config)
    moe: MoEConfig = field(default_factory=MoEConfig)
