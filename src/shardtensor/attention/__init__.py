"""Attention over keys and values that lie on several ranks: the kernels below the rules."""

from .ring import attend

__all__ = ["attend"]
