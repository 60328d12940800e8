"""The chat template to ship beside a checkpoint, for everything that reads Jinja.

It writes what `data.chat.render.render` writes, and marks what is supervised for `apply_chat_template` of transformers.
"""

from __future__ import annotations

from pathlib import Path

from data.chat.render import SIZES, ChatError
from model import Gemma4Config

_SOURCE = Path(__file__).parent / "gemma4.jinja"


def template_size(config: Gemma4Config) -> str:
    """Which template a model was released with: "small" for E2B and E4B, "large" for the others."""
    return "small" if config.hidden_size_per_layer_input else "large"


def chat_template(size: str) -> str:
    """Text of the template for E2B and E4B ("small") or for 12B, 26B-A4B and 31B ("large")."""
    if size not in SIZES:
        raise ChatError(f"size={size!r} is no chat template; legal: {', '.join(SIZES)}.")
    large = "true" if size == "large" else "false"
    return f"{{%- set large = {large} -%}}\n{_SOURCE.read_text(encoding='utf-8')}"
