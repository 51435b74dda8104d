"""Attention over keys and values that lie on several ranks: the kernels below the rules."""

from .ring import attend
from .strategy import all_to_all_pays, chosen, strategy

__all__ = ["all_to_all_pays", "attend", "chosen", "strategy"]
