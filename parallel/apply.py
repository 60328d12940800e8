"""A model built on `meta` and laid over a mesh: the order of the plans, and why each stands where it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from model import Gemma4, Gemma4Config
from model.init import Fill
from model.inputs import Inputs
from model.precision import accumulation_dtype
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.context.plan import ContextParallel
from parallel.embedding_shards import shard_embedding_rows
from parallel.expert import apply_expert_parallel
from parallel.float8 import apply_float8
from parallel.fsdp import shard
from parallel.materialize import materialize
from parallel.mesh import Mesh
from parallel.options import ParallelConfig, PlanConfig
from parallel.pipeline.layout import cut_layers, num_stages
from parallel.pipeline.stage import Gemma4Stage, Stages
from parallel.pipeline.weight_gradients import defer_weight_gradients
from parallel.router_losses import RouterBalance, watch_routers
from parallel.tensor.plan import apply_tensor_parallel
from parallel.tensor.tokens import TensorParallel

if TYPE_CHECKING:
    from parallel.pipeline.schedule import Pipeline


@dataclass(frozen=True)
class ParallelModel:
    """What this rank holds of a model laid over a mesh, and the plans that batches and generation need to know of."""

    config: Gemma4Config
    model: nn.Module
    """`Gemma4`, or with a pipeline the `Stages` of this rank; parameters have the names of the whole model."""
    mesh: Mesh
    tensor: TensorParallel | None
    context: ContextParallel | None
    pipeline: Pipeline | None
    routers: list[RouterBalance]
    products: str
    """How the products of dense layers are computed, for the log."""

    @property
    def plans(self) -> list[Callable[[Inputs], Inputs]]:
        """What makes this rank's inputs of a batch's, on the CPU."""
        return (self.whole if self.pipeline is None else self.pipeline.stages[0]).plans

    @property
    def whole(self) -> Gemma4:
        """The model, where it is not cut into stages."""
        assert isinstance(self.model, Gemma4)
        return self.model


def build_parallel_model(
    config: Gemma4Config,
    mesh: Mesh,
    device: torch.device,
    fill: Fill,
    plans: PlanConfig | None = None,
    *,
    frozen: tuple[str, ...] = (),
    compute_dtype: torch.dtype = torch.float32,
    sequence_length: int = 4096,
) -> ParallelModel:
    """A model, or the stages of it that this rank holds, built on `meta`, laid over the mesh, then given values.

    frozen: names of modules that are not trained. sequence_length: where a pipeline is cut depends on it.
    The order of the plans is not free; each line says why it stands where it does.
    """
    layout, plans = mesh.layout, plans or PlanConfig()
    parallel = plans.parallel
    with torch.device("meta"):
        stages = _stages(config, mesh, parallel, sequence_length) if layout.pp > 1 else []
        parts: Sequence[Gemma4] = stages or [Gemma4(config)]
    for part in parts:
        part.to(accumulation_dtype(compute_dtype))  # master weights
    context = ContextParallel(config, mesh.cp) if layout.cp > 1 else None
    tensor, products = None, ""
    routers: list[RouterBalance] = []
    for part in parts:
        # Frozen first: every plan below passes `requires_grad` on to the parameters it makes.
        modules = dict(part.named_modules())
        for name in frozen:
            if name in modules:
                modules[name].requires_grad_(False)
        # Tensor parallel replaces table and head and splits linear layers, whose other parts later plans set.
        tensor = apply_tensor_parallel(part, mesh.tp, layout.sequence_parallel) if layout.tp > 1 else None
        # Inputs are cut along the sequence first: a rank of tp then has a run of what is left.
        part.plans = [*([context.cut] if context else []), *([tensor.deal] if tensor else [])]
        # Experts after it, since its ranks, which hold the same tokens, then share them out.
        apply_expert_parallel(part, mesh, tensor)
        routers += watch_routers(part, mesh.groups, plans.moe)
        # Context parallel replaces nothing: it is how the attention modules, by now final, get their keys.
        if context is not None:
            context.apply(part)
            if isinstance(part, Gemma4Stage):
                part.context = context
        # float8 needs the sizes that are left on a rank, which a GPU must accept, and the final expert modules.
        products = apply_float8(part, plans.float8)
        # Deferral takes the layers whose product is still the plain one.
        if parallel.pp_schedule == "zero_bubble" and isinstance(part, Gemma4Stage):
            part.deferred = defer_weight_gradients(part)
        # Tables whose rows stay sharded: after tensor parallel, which may have split the token table already, and
        # before FSDP, which must leave them alone.
        sharded_rows = shard_embedding_rows(part, mesh, compute_dtype, tensor)
        # Recomputation inside FSDP: a layer is gathered again for the backward before it is computed again.
        apply_activation_checkpoint(part, plans.activation_checkpoint)
        # FSDP last of all plans, over parameters that are final in number, shape and dtype.
        shard(part, mesh, parallel, compute_dtype, elsewhere=sharded_rows)
        # Storage at the end: each rank allocates only the slices it keeps.
        materialize(part, device, fill, offloaded=parallel.cpu_offload)
    pipeline, model = None, cast(nn.Module, parts[0])
    if stages:
        from parallel.pipeline.schedule import Pipeline  # imports slowly, so only when asked for

        pipeline, model = Pipeline(stages, mesh, parallel, compute_dtype), Stages(stages)
    return ParallelModel(config, model, mesh, tensor, context, pipeline, routers, products)


def _stages(config: Gemma4Config, mesh: Mesh, parallel: ParallelConfig, sequence_length: int) -> list[Gemma4Stage]:
    """The stages of this rank: every pp-th."""
    count = num_stages(parallel.pp_schedule, parallel.pp_virtual, mesh.layout.pp)
    spans = cut_layers(config, sequence_length, count)
    return [Gemma4Stage(config, span) for span in spans[mesh.at["pp"] :: mesh.layout.pp]]
