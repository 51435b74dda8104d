"""Routes of indices that are used again: found once for each index, until it changes or is gone.

An index is known by its memory and compared with what it was, so that no way of writing to it goes
unseen; all ranks agree, in one small message, that theirs is still the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _torch, cache, comm
from ..comm.route import Route
from ..tensor.redistribute import local_of

_MOST = 64


class _Kept:
    """Routes by index; those of indices that are gone are dropped."""

    def __init__(self) -> None:
        self.found: OrderedDict[Any, tuple[Any, Tensor, Route]] = OrderedDict()

    def cache_clear(self) -> None:
        self.found.clear()

    def get(self, key: Any, at: Tensor) -> Route | None:
        if key not in self.found:
            return None
        ref, was, route = self.found[key]
        if ref.expired() or not torch.equal(was, at):
            return None
        self.found.move_to_end(key)
        return route

    def put(self, key: Any, ref: Any, at: Tensor, route: Route) -> None:
        for k in [k for k, (r, *_) in self.found.items() if r.expired()]:
            del self.found[k]
        self.found[key] = ref, at.clone(), route
        while len(self.found) > _MOST:
            self.found.popitem(last=False)


_kept = _Kept()
cache.register(_kept)


def route_of(index: Tensor, at: Tensor, key: Any, group: str, make: Callable[[], Route]) -> Route:
    """The route of an index, of which this rank has the entries `at`.

    key: what else the route depends on. group: all ranks that make it together.
    """
    local = local_of(index)
    ref = _torch.storage_ref(local)
    full = (ref.cdata, local.storage_offset(), local.shape, local.stride(), local.dtype, key)
    route = _kept.get(full, at)
    if comm.size(group) > 1:
        seen = torch.tensor(int(route is not None), device=local.device)
        if not int(comm.reduce(seen, group, "min")):
            route = None
    if route is None:
        route = make()
        _kept.put(full, ref, at, route)
    return route
