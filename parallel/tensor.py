"""Tensor and sequence parallel: heads, feed-forward columns and the vocabulary split over `tp`.

| part                          | split                                                                       |
|-------------------------------|-----------------------------------------------------------------------------|
| q_proj, o_proj                | by query head                                                               |
| k_proj, v_proj                | by KV head; with fewer KV heads than ranks each rank computes the one it needs |
| gate, up, down                | by intermediate column                                                      |
| token table = head            | by piece (vocabulary.py)                                                    |
| norms, router, per-layer gates, projections and towers | whole on every rank                                |

With sequence parallel each rank holds its run of the stream's tokens between blocks: a norm's
output is gathered where a split product follows, and a block's output is summed and scattered.
Without it every rank holds the whole stream, and a block's output is summed. In both cases a
whole parameter's gradient is a part on each rank, and FSDP, which shards it over `tp` too, adds
the parts: no other reduction is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from model import Gemma4
from model.config import LayerConfig
from model.decoder import DecoderLayer
from parallel.linear import ParallelLinear
from parallel.sequence_parallel import TensorParallel
from parallel.sharded import sharded_parameter
from parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead


def apply_tensor_parallel(model: Gemma4, mesh: DeviceMesh, sequence_parallel: bool) -> TensorParallel:
    """Split a model on `meta`, or one pipeline stage of it, over the ranks of `mesh`."""
    plan = TensorParallel(mesh, sequence_parallel)
    text = model.language_model
    for layer in model.layers:
        _split_layer(layer, plan)
    if hasattr(text, "embed_tokens"):
        text.embed_tokens = VocabParallelEmbedding(cast(nn.Embedding, text.embed_tokens), plan)
    if hasattr(text, "norm"):
        text.norm.register_forward_hook(_then(plan.all_gather_tokens))
    model.head = VocabParallelHead(model.config.final_logit_softcapping, plan)
    return plan


def _split_layer(layer: DecoderLayer, plan: TensorParallel) -> None:
    attn, mlp, config = layer.self_attn, layer.mlp, layer.spec
    attn.q_proj, attn.o_proj = _split(attn.q_proj, plan, 0), _split(attn.o_proj, plan, 1)
    if not config.is_kv_consumer:
        attn.k_proj = _split_heads(attn.k_proj, plan, config)
        attn.v_proj = None if attn.v_proj is None else _split_heads(attn.v_proj, plan, config)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        _split(linear, plan, dim) for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1))
    )
    for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
        norm.register_forward_hook(_then(plan.all_gather_tokens))
    for linear in (attn.o_proj, mlp.down_proj):
        linear.register_forward_hook(_then(plan.reduce_scatter_tokens))


def _split(linear: nn.Linear, plan: TensorParallel, dim: int) -> ParallelLinear:
    return ParallelLinear(linear, sharded_parameter(linear.weight, plan.mesh, (Shard(dim),)))


def _split_heads(linear: nn.Linear, plan: TensorParallel, layer: LayerConfig) -> ParallelLinear:
    """A linear layer split by KV head; with fewer heads than ranks it stays whole, and each computes one of them."""
    heads = layer.num_kv_heads
    if heads % plan.size == 0:
        return _split(linear, plan, 0)
    head = plan.rank * heads // plan.size
    return ParallelLinear(
        linear, cast(nn.Parameter, linear.weight), slice(head * layer.head_dim, (head + 1) * layer.head_dim)
    )


def _then(step: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return step(output)

    return hook
