"""Caches of pure functions of specs, which a new simulated world empties."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., Any])
_caches: list[Any] = []
# around what is made once and then kept: see `_torch.dispatcher.unrecorded`, which sets it
making: Callable[[], AbstractContextManager[Any]] = nullcontext


def unseen(fn: F) -> F:
    """The function of which results are kept, so that others may not see it run."""

    @wraps(fn)
    def make(*args: Any, **kwargs: Any) -> Any:
        with making():
            return fn(*args, **kwargs)

    return make  # type: ignore[return-value]


def cached(fn: F) -> F:
    """The function with its last 4096 results kept; arguments must be hashable."""
    kept = lru_cache(maxsize=4096)(unseen(fn))
    _caches.append(kept)
    return kept  # type: ignore[return-value]


def register(kept: Any) -> None:
    """Another cache to empty: anything with `cache_clear`."""
    _caches.append(kept)


_of_tensors: dict[int, tuple[weakref.ref[Tensor], int, dict[Hashable, Any]]] = {}


def of_tensor(x: Tensor, key: Hashable, make: Callable[[], V]) -> V:
    """make(), kept under the key while the tensor object x lives and torch does not write to it.

    Not kept in a CUDA graph's capture, where tensors have no values yet.
    """
    if x.is_inference():
        # torch counts no writes to it
        return make()
    ref, version, kept = _of_tensors.get(id(x), (None, -1, {}))
    if ref is None or ref() is not x or version != x._version:
        kept = {}
        at = id(x)
        gone = weakref.ref(x, lambda ref: _forget(at, ref))
        _of_tensors[at] = (gone, x._version, kept)
    if key not in kept:
        with making():
            made = make()
        if capturing(x.device):
            return made
        kept[key] = made
    return kept[key]


def forget(x: Tensor) -> None:
    """Forget what is kept of a tensor object."""
    _of_tensors.pop(id(x), None)


def _forget(at: int, ref: Any) -> None:
    # another tensor may lie there by now
    if at in _of_tensors and _of_tensors[at][0] is ref:
        del _of_tensors[at]


def capturing(device: torch.device) -> bool:
    """Whether what is launched there now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def clear() -> None:
    """Forget every kept result."""
    for c in _caches:
        c.cache_clear()
    _of_tensors.clear()
