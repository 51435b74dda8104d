"""Attention over keys and values that lie on several ranks: the kernels below the rules."""

from .ring import attend
from .strategy import all_to_all_pays, balance_pays, chosen, strategy
from .zigzag import attend_balanced

__all__ = [
    "all_to_all_pays",
    "attend",
    "attend_balanced",
    "balance_pays",
    "chosen",
    "strategy",
]
