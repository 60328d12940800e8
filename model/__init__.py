"""Gemma 4 in plain PyTorch, on one device."""

from model.config import ConfigError, Gemma4Config
from model.errors import UserError
from model.gemma4 import Gemma4

__all__ = ["ConfigError", "Gemma4", "Gemma4Config", "UserError"]
