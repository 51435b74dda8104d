"""Routes of indices that are used again: found once for each index, until it changes or is gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _torch, cache, comm
from ..comm.route import Route
from ..tensor import ShardTensor

_MOST = 64


class _Kept:
    """Routes by index; those of indices that are gone are dropped."""

    def __init__(self) -> None:
        self.found: OrderedDict[Any, tuple[Any, Route]] = OrderedDict()

    def cache_clear(self) -> None:
        self.found.clear()

    def get(self, key: Any) -> Route | None:
        ref, route = self.found.get(key, (None, None))
        if ref is None or ref.expired():
            return None
        self.found.move_to_end(key)
        return route

    def put(self, key: Any, ref: Any, route: Route) -> None:
        for k in [k for k, (r, _) in self.found.items() if r.expired()]:
            del self.found[k]
        self.found[key] = ref, route
        while len(self.found) > _MOST:
            self.found.popitem(last=False)


_kept = _Kept()
cache.register(_kept)


def route_of(index: Tensor, key: Any, group: str, make: Callable[[], Route]) -> Route:
    """The route of an index; key: of what else it depends on. group: all ranks that make it.

    A plain index is the same on all ranks, and so is whether it was seen before. Ranks ask each
    other, in one small message, about a sharded one: a change in place may leave an empty shard as
    it was.
    """
    local = index._local if isinstance(index, ShardTensor) else index
    ref = _torch.storage_ref(local)
    place = (ref.cdata, local.storage_offset(), local.shape, local.stride(), local.dtype)
    full = (*place, local._version, key)
    route = _kept.get(full)
    if isinstance(index, ShardTensor) and comm.size(group) > 1:
        seen = torch.tensor(int(route is not None), device=local.device)
        if not int(comm.reduce(seen, group, "min")):
            route = None
    if route is None:
        route = make()
        _kept.put(full, ref, route)
    return route
