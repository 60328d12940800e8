"""The reference: `transformers` models built from small random configs, with perturbed weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from model import Gemma4, Gemma4Config
from tests.harness.compare import in_double

FAMILIES = ("e2b", "e4b", "12b", "26b_a4b", "31b")


def random_config(family: str, seed: int) -> Gemma4Config:
    """A small config with every structural feature of the family and sizes drawn at random."""
    draw = random.Random(f"{family}/{seed}")
    pattern = draw.choice((2, 3))
    layers = pattern * draw.choice((2, 3)) + draw.choice((0, 1))
    kv_heads, group = {
        "e2b": (1, (4, 8)),
        "e4b": (2, (2, 4)),
        "12b": (4, (2,)),
        "26b_a4b": (4, (2,)),
        "31b": (4, (1, 2)),
    }[family]
    fields: dict[str, Any] = {
        "vocab_size": draw.choice((160, 257)),
        "vocab_size_per_layer_input": 257,
        "hidden_size": draw.choice((48, 64)),
        "intermediate_size": draw.choice((64, 96)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw.choice(group),
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": {"12b": 1, "26b_a4b": 2, "31b": 2}.get(family),
        "head_dim": draw.choice((8, 16)),
        "global_head_dim": draw.choice((16, 32)),
        "sliding_window": draw.choice((5, 16, 64)),
        "sliding_window_pattern": pattern,
        "final_logit_softcapping": 30.0,
    }
    if family in ("e2b", "e4b"):
        fields |= {
            "num_kv_shared_layers": draw.randint(1, layers - pattern),
            "hidden_size_per_layer_input": draw.choice((8, 12)),
            "use_double_wide_mlp": family == "e2b",
        }
    else:
        fields["attention_k_eq_v"] = True
    if family == "26b_a4b":
        fields |= {
            "enable_moe_block": True,
            "num_experts": draw.choice((5, 8)),
            "top_k_experts": draw.choice((2, 3)),
            "moe_intermediate_size": 24,
        }
    return Gemma4Config(**fields)


def reference_config(config: Gemma4Config) -> Gemma4TextConfig:
    """The same model in the reference's terms."""
    same = [
        "vocab_size",
        "vocab_size_per_layer_input",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_global_key_value_heads",
        "head_dim",
        "global_head_dim",
        "sliding_window",
        "attention_k_eq_v",
        "num_kv_shared_layers",
        "use_double_wide_mlp",
        "hidden_size_per_layer_input",
        "enable_moe_block",
        "num_experts",
        "top_k_experts",
        "moe_intermediate_size",
        "final_logit_softcapping",
        "rms_norm_eps",
        "max_position_embeddings",
    ]
    return Gemma4TextConfig(
        **{name: getattr(config, name) for name in same},
        layer_types=list(config.layer_types),
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config.global_rope_theta,
                "partial_rotary_factor": config.partial_rotary_factor,
            },
        },
    )


def perturbed_reference(config: Gemma4Config, seed: int) -> Gemma4ForCausalLM:
    """Random weights with norms, scalars and router scales off their initial values, where half the bugs hide."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM._from_config(
        reference_config(config), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("layer_scalar") or (tensor.dim() == 1 and name in dict(model.named_parameters())):
                tensor.copy_(vector_scale(name, tensor) * (0.5 + torch.rand(tensor.shape, generator=generator)))
            elif tensor.dim() >= 2 and "embed" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)
            elif tensor.dim() >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def vector_scale(name: str, vector: Tensor) -> float:
    """Query norms near head_dim^-1/2, where training takes them, so that scores have a deviation near 1; the rest 1.

    There is no score scale. At 1, where they start, scores deviate by the square root of the head width: attention so
    sharp turns rounding of 1e-7 into gradients that differ by 1e-4, whoever computes them.
    """
    return vector.numel() ** -0.5 if name.endswith("q_norm.weight") else 1.0


@contextmanager
def reference_in_double(reference: Any) -> Iterator[None]:
    """The reference in float64, also where its code asks for float32 by name or keeps a constant in it."""
    by_name = patch.object(torch.Tensor, "float", torch.Tensor.double), patch.object(torch, "float32", torch.float64)
    with in_double(reference):
        for module in reference.modules():
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale.fill_(module.scalar_embed_scale)
        with by_name[0], by_name[1]:
            yield


EXACT = 1e-11
"""Relative difference to the reference where both are in float64, which rounds at 1e-16."""


def to_bfloat16(reference: Gemma4ForCausalLM) -> Gemma4ForCausalLM:
    """Like `from_pretrained(dtype=bfloat16)`: rotary frequencies stay float32, which `.bfloat16()` rounds."""
    kept = {name: buffer.clone() for name, buffer in reference.named_buffers() if "inv_freq" in name}
    reference.bfloat16()
    for name, buffer in kept.items():
        module, _, attribute = name.rpartition(".")
        setattr(reference.get_submodule(module), attribute, buffer)
    return reference


def ours_from(reference: Gemma4ForCausalLM, config: Gemma4Config) -> Gemma4:
    """Our model with the reference's weights; every tensor must find its place."""
    model = Gemma4(config)
    state = {
        name.replace("model.", "language_model.", 1): tensor
        for name, tensor in reference.state_dict().items()
        if name != "lm_head.weight"
    }
    model.load_state_dict(state, strict=True)
    return model


def reference_step(
    reference: Gemma4ForCausalLM,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every gradient of the summed cross entropy over labels that are not -100."""
    reference.zero_grad()
    logits = reference(tokens_BS, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="sum")
    (loss / (labels_BS != -100).sum()).backward()
    grads = {
        name.replace("model.", "language_model.", 1): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), grads


def ours_step(
    model: Gemma4,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    document_ids: Tensor | None = None,
    skip: bool = True,
    positions: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every gradient of the same loss through the supervised path and the fused loss."""
    from model.head import Tiles, linear_cross_entropy

    model.zero_grad()
    keep = labels_BS != -100
    hidden = model(tokens_BS, positions, document_ids, supervised=keep if skip else None)
    loss = linear_cross_entropy(
        hidden if skip else hidden[keep],
        model.head_weight,
        labels_BS[keep],
        softcap=model.config.final_logit_softcapping,
        tiles=Tiles(16, 100),
    )
    (loss.total / keep.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
