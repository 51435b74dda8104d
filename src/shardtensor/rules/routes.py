"""Routes of indices that are used again: found once for each index, until it changes or is gone.

An index is known by its memory and compared with what it was, so that no way of writing to it goes
unseen; all ranks agree, in one small message, that theirs is still the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _torch, cache, comm
from ..comm.route import Route
from ..tensor.redistribute import local_of

_MOST = 64
V = TypeVar("V")


class _Kept:
    """What was found of indices; that of indices that are gone is dropped."""

    def __init__(self) -> None:
        self.found: OrderedDict[Any, tuple[Any, tuple[Tensor, ...], Any]] = OrderedDict()

    def cache_clear(self) -> None:
        self.found.clear()

    def get(self, key: Any, *at: Tensor) -> Any:
        if key not in self.found:
            return None
        ref, was, found = self.found[key]
        if ref.expired() or not all(map(torch.equal, was, at)):
            return None
        self.found.move_to_end(key)
        return found

    def put(self, key: Any, ref: Any, found: Any, *at: Tensor) -> None:
        for k in [k for k, (r, *_) in self.found.items() if r.expired()]:
            del self.found[k]
        self.found[key] = ref, tuple([x.clone() for x in at]), found
        while len(self.found) > _MOST:
            self.found.popitem(last=False)


_kept = _Kept()
cache.register(_kept)


def route_of(index: Tensor, at: Tensor, key: Any, group: str, make: Callable[[], Route]) -> Route:
    """The route of an index, of which this rank has the entries `at`.

    key: what else the route depends on. group: all ranks that make it together.
    """
    # a route outlives the transforms of torch.func, which integers have no part in
    at = _torch.unwrapped(at)
    ref, full = _named(_torch.unwrapped(local_of(index)), key)
    route: Route | None = _kept.get(full, at)
    if comm.size(group) > 1:
        seen = torch.tensor(int(route is not None), device=at.device)
        if not int(comm.reduce(seen, group, "min")):
            route = None
    if route is None:
        route = make()
        _kept.put(full, ref, route, at)
    return route


def kept(pattern: Sequence[Tensor], key: Any, make: Callable[[], V]) -> V:
    """make(), kept while the first of some index tensors lives and they stay as they are.

    They are alike on all ranks, and make does not communicate: nothing has to be agreed on.
    """
    ref, full = _named(pattern[0], key)
    found: V | None = _kept.get(full, *pattern)
    if found is None:
        found = make()
        _kept.put(full, ref, found, *pattern)
    return found


def _named(x: Tensor, key: Any) -> tuple[Any, tuple[Any, ...]]:
    """A weak reference to the memory of an index, and what names it with its key."""
    ref = _torch.storage_ref(x)
    return ref, (ref.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, key)
