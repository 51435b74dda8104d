"""Attention over keys and values that lie on several ranks: the kernels below the rules."""

from .cost import Rates, Way, Work
from .ring import attend
from .strategy import RATES, assume, cheapest, chosen, rates, strategy
from .usp import attend_in_teams, fits
from .zigzag import attend_balanced

__all__ = [
    "RATES",
    "Rates",
    "Way",
    "Work",
    "assume",
    "attend",
    "attend_balanced",
    "attend_in_teams",
    "cheapest",
    "chosen",
    "fits",
    "rates",
    "strategy",
]
