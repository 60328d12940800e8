"""Every variant with its sizes, features and parameter counts, or the named ones; `gemma4_` may be left out.

python -m launch.variants
python -m launch.variants e4b 31b        # some of them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from launch.arguments import run
from model import Gemma4, Gemma4Config
from model.encoders.config import ENCODERS, AudioConfig, VisionConfig
from model.variants import HUB_IDS, VARIANT_NAMES


@dataclass
class Options:
    """Arguments of `gemwright variants`."""

    names: list[str] = field(default_factory=list)


def parameters(config: Gemma4Config) -> dict[str, int]:
    """Counts on `meta`: total, token and per-layer tables, text parameters a token uses, vision, audio."""
    with torch.device("meta"):
        model = Gemma4(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def count(*parts: str) -> int:
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    experts, active = count(".experts."), 0
    if config.moe is not None:
        active = experts * config.moe.top_k // config.moe.num_experts
    return {
        "total": sum(sizes.values()),
        "tables": count("embed_tokens"),
        "active text": count("language_model.") - experts + active,
        "vision": count(*ENCODERS["vision"]),
        "audio": count(*ENCODERS["audio"]),
    }


def features(config: Gemma4Config) -> str:
    """What sets a variant apart from a plain transformer, in words."""
    found = [
        f"KV shared by {config.num_kv_shared_layers} layers" if config.num_kv_shared_layers else "",
        "per-layer embeddings" if config.hidden_size_per_layer_input else "",
        "double-wide MLP" if config.use_double_wide_mlp else "",
        "K = V" if config.attention_k_eq_v else "",
        f"{config.num_experts} experts, top {config.top_k_experts}" if config.enable_moe_block else "",
        "vision tower" if isinstance(config.vision, VisionConfig) else "patch embedder" if config.vision else "",
        "audio tower" if isinstance(config.audio, AudioConfig) else "waveform embedder" if config.audio else "",
        "images both ways" if config.sees_images_both_ways else "",
    ]
    return ", ".join(part for part in found if part)


def row(name: str) -> dict[str, Any]:
    """Cells of a variant's line in the table, by column."""
    config = Gemma4Config.from_name(name)
    full = sum(layer_type == "full_attention" for layer_type in config.layer_types)
    shape = f"{config.num_hidden_layers} ({full} full) x {config.hidden_size}"
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads}"
    if config.attention_k_eq_v and config.num_global_key_value_heads:
        heads += f" (full /{config.num_global_key_value_heads})"
    counts = {key: f"{value:,}" for key, value in parameters(config).items()}
    return {"name": name, "layers x width": shape, "heads/KV": heads, "window": config.sliding_window, **counts} | {
        "features": features(config),
        "weights": HUB_IDS.get(name, "none: trained from scratch"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Columns as wide as their widest cell."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def list_variants(options: Options) -> None:
    """Print a table of the named variants, or of all."""
    print(table([row(f"gemma4_{name.removeprefix('gemma4_')}") for name in options.names or VARIANT_NAMES]))
    print("\nWhat has been verified of each, and what nobody has run yet: README.md, 'What is tested'.")


def main() -> None:
    """List the variants that the command line names."""
    run(Options, list_variants, __doc__, "names")


if __name__ == "__main__":
    main()
