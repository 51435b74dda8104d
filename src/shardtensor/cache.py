"""Caches of pure functions of specs, which a new simulated world empties."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_caches: list[Any] = []


def cached(fn: F) -> F:
    """The function with its last 4096 results kept; arguments must be hashable."""
    kept = lru_cache(maxsize=4096)(fn)
    _caches.append(kept)
    return kept  # type: ignore[return-value]


def register(kept: Any) -> None:
    """Another cache to empty: anything with `cache_clear`."""
    _caches.append(kept)


def clear() -> None:
    """Forget every kept result."""
    for c in _caches:
        c.cache_clear()
