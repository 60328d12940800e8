"""Tensor and sequence parallel: heads, feed-forward columns and the vocabulary split over `tp`.

`LAYER` below is the table of a decoder layer. The token table, which is the head too, is split by piece of the
vocabulary (vocabulary.py). All else is whole on every rank.

With sequence parallel each rank holds its run of the tokens between blocks: a norm's
output is gathered where a split product follows, and a block's output is summed and scattered.
Without it every rank holds all tokens, and a block's output is summed. In both cases a
whole parameter's gradient is a part on each rank, and FSDP, which shards it over `tp` too, adds
the parts: no other reduction is needed.

The plan is ours, and not torch's `parallelize_module`, because a rank may compute one of a few KV heads that all
hold, and because kept positions are dealt out anew among the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from fnmatch import fnmatch
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from model import Gemma4
from model.config import LayerConfig
from model.linear import Linear
from parallel.dtensors import local_part, sharded_parameter
from parallel.tensor.tokens import TensorParallel
from parallel.tensor.vocabulary import VocabParallelEmbedding, VocabParallelHead


class Split(Enum):
    """How `tp` splits a part of a decoder layer."""

    OUTPUTS = "by output: rows of the weight; the input must be all tokens"
    KV_HEADS = "by output, whole KV heads; with fewer heads than ranks it is whole, and each computes the one it needs"
    INPUTS = "by input: columns of the weight; the outputs of the ranks are summed"
    GATHERED = "whole; its output is gathered, for a split product that follows"
    WHOLE = "whole on every rank"
    EXPERTS = "left to expert parallel (expert.py)"


LAYER = {
    "input_layernorm": Split.GATHERED,
    "self_attn.q_proj": Split.OUTPUTS,
    "self_attn.k_proj": Split.KV_HEADS,
    "self_attn.v_proj": Split.KV_HEADS,
    "self_attn.[qk]_norm": Split.WHOLE,
    "self_attn.o_proj": Split.INPUTS,
    "pre_feedforward_layernorm": Split.GATHERED,
    "mlp.gate_proj": Split.OUTPUTS,
    "mlp.up_proj": Split.OUTPUTS,
    "mlp.down_proj": Split.INPUTS,
    "post_*layernorm": Split.WHOLE,
    "*_feedforward_layernorm_[12]": Split.WHOLE,
    "router.*": Split.WHOLE,
    "router": Split.WHOLE,
    "experts": Split.EXPERTS,
    "per_layer_*": Split.WHOLE,
    "post_per_layer_input_norm": Split.WHOLE,
}
"""How each module of a decoder layer that has parameters of its own is split."""


def apply_tensor_parallel(model: Gemma4, mesh: DeviceMesh, sequence_parallel: bool) -> TensorParallel:
    """Split a model on `meta`, or one pipeline stage of it, over the ranks of `mesh`."""
    plan = TensorParallel(mesh, sequence_parallel)
    text = model.language_model
    for layer in model.layers:
        for name, module in layer.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                _split(name, module, plan, layer.spec)
    if hasattr(text, "embed_tokens"):
        text.embed_tokens = VocabParallelEmbedding(cast(nn.Embedding, text.embed_tokens), plan)
    if hasattr(text, "norm"):
        text.norm.register_forward_hook(_then(plan.all_gather_tokens))
    model.head = VocabParallelHead(model.config.final_logit_softcapping, plan)
    return plan


def split_of(name: str) -> Split:
    """The one row of `LAYER` for a module of a decoder layer.

    An adapter `b(a(x))` is split by its layer's outputs in b, or by its inputs in a; its other half is whole.
    """
    layer, _, half = name.partition(".adapter.")
    rows = [split for pattern, split in LAYER.items() if fnmatch(layer, pattern)]
    assert len(rows) == 1, f"{layer} is in {len(rows)} rows of the table of tensor parallel"
    (split,) = rows
    return Split.WHOLE if half and half != ("a" if split is Split.INPUTS else "b") else split


def _split(name: str, module: nn.Module, plan: TensorParallel, spec: LayerConfig) -> None:
    split = split_of(name)
    if split is Split.GATHERED:
        module.register_forward_hook(_then(plan.all_gather_tokens))
    elif split in (Split.OUTPUTS, Split.KV_HEADS, Split.INPUTS):
        assert isinstance(module, Linear)
        if split is Split.KV_HEADS and spec.num_kv_heads % plan.size:
            head = plan.rank * spec.num_kv_heads // plan.size
            rows = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
            module.read = lambda weight: weight[rows]
            return
        shard = Shard(1 if split is Split.INPUTS else 0)
        module.weight, module.read = sharded_parameter(module.weight, plan.mesh, (shard,)), local_part
        if split is Split.INPUTS and ".adapter." not in name:  # the sum includes the adapter's
            module.after = plan.reduce_scatter_tokens


def _then(step: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return step(output)

    return hook
