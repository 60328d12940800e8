"""Sizes of the variants, and configs that cannot work."""

from __future__ import annotations

import pytest
import torch

from model import ConfigError, Gemma4, Gemma4Config
from model.variants import VARIANT_NAMES
from tests.harness.report import report

# Total, language model, token table, per-layer table, vision and audio encoder, their projectors: docs/gemma4.md 1.2.
PARTS = ("total", "language model", "token table", "per-layer table", "vision", "embed_vision", "audio", "embed_audio")
PARAMETERS = {
    "e2b": (
        *(5_104_297_504, 4_628_569_344, 402_653_184, 2_348_810_240),
        *(167_364_608, 1_179_648, 304_824_608, 2_359_296),
    ),
    "e4b": (
        *(7_941_100_832, 7_463_013_376, 671_088_640, 2_818_572_288),
        *(167_364_608, 1_966_080, 304_824_608, 3_932_160),
    ),
    "12b": (11_959_730_176, 11_907_350_272, 1_006_632_960, 0, 35_176_704, 14_745_600, 0, 2_457_600),
    "26b_a4b": (25_805_933_872, 25_233_141_760, 738_197_504, 0, 569_548_080, 3_244_032, 0, 0),
    "31b": (31_273_086_512, 30_697_345_280, 1_409_286_144, 0, 569_548_080, 6_193_152, 0, 0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_equal_the_released_models(name: str) -> None:
    with torch.device("meta"):
        model = Gemma4(Gemma4Config.from_name(f"gemma4_{name}"))
    sizes = {key: p.numel() for key, p in model.named_parameters()}

    def total(*prefixes: str) -> int:
        return sum(size for key, size in sizes.items() if key.startswith(prefixes))

    found = (
        total(""),
        total("language_model."),
        total("language_model.embed_tokens.weight"),
        total("language_model.embed_tokens_per_layer.weight"),
        total("vision_tower.", "vision_embedder."),
        total("embed_vision."),
        total("audio_tower."),
        total("embed_audio."),
    )
    report(
        "Parameters on meta, equal to the released models'",
        {"variant": name} | dict(zip(PARTS, map("{:,}".format, found), strict=True)),
    )
    assert found == PARAMETERS[name]
    assert all(p.is_meta for p in model.parameters())


def test_layers_of_the_released_models() -> None:
    e2b, e4b, b31 = (Gemma4Config.from_name(f"gemma4_{n}") for n in ("e2b", "e4b", "31b"))
    assert [i for i, kind in enumerate(e2b.layer_types) if kind == "full_attention"] == [4, 9, 14, 19, 24, 29, 34]
    assert (e2b.layer(15).kv_source, e2b.layer(19).kv_source) == (13, 14)
    assert (e4b.layer(24).kv_source, e4b.layer(29).kv_source) == (22, 23)
    assert (e2b.layer(14).intermediate_size, e2b.layer(15).intermediate_size) == (6144, 12_288)
    assert (b31.layer(5).num_kv_heads, b31.layer(5).head_dim, b31.layer(5).k_eq_v) == (4, 512, True)
    assert (b31.layer(0).num_kv_heads, b31.layer(0).head_dim, b31.layer(0).window) == (16, 256, 1024)


@pytest.mark.parametrize("name", [n for n in VARIANT_NAMES if "tiny" in n])
def test_tiny_variants_divide_for_every_mesh_and_keep_their_parent_s_features(name: str) -> None:
    config, parent = Gemma4Config.from_name(name), Gemma4Config.from_name(name.replace("tiny_", ""))
    assert config.num_attention_heads >= 8 and config.num_hidden_layers >= 12
    assert set(config.layer_types) == set(parent.layer_types)
    assert config.sliding_window_pattern == parent.sliding_window_pattern
    for feature in (
        "num_kv_shared_layers",
        "hidden_size_per_layer_input",
        "attention_k_eq_v",
        "enable_moe_block",
        "use_double_wide_mlp",
        "num_global_key_value_heads",
    ):
        assert bool(getattr(config, feature)) == bool(getattr(parent, feature)), feature


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_key_value_heads": 3}, "legal here: 1, 2, 4, 8"),
        ({"head_dim": 15}, "nearest: 14"),
        ({"num_kv_shared_layers": 11}, "largest legal here: 6"),
        ({"enable_moe_block": True}, "needs model.num_experts"),
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8}, "legal here: 4"),
        ({"hidden_size": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gemma4Config.from_name("gemma4_tiny_e4b", **overrides)


def test_an_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest: gemma4_31b"):
        Gemma4Config.from_name("gemma4_31")
