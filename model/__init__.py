"""Gemma 4 in plain PyTorch, on one device.

Its formulas, names and pitfalls are in docs/gemma4.md. A tensor's name ends in the letters of its
axes: `x_TD` is a tensor [T, D]. A file that uses other letters, or these otherwise, says so at its top.

    B  batch           D  model dim      F  feed-forward dim
    S  sequence        N  query heads    E  experts
    T  tokens, B * S   K  KV heads       P  per-layer-embedding dim
    L  layers          H  head dim       R  rotated pairs of a head
    V  vocabulary      k  experts chosen for a token
"""

from model.config import ConfigError, Gemma4Config
from model.errors import UserError
from model.gemma4 import Gemma4

__all__ = ["ConfigError", "Gemma4", "Gemma4Config", "UserError"]
