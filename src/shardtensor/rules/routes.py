"""Routes of indices that are used again: found once for each index, until it changes or is gone.

An index is known by its memory and compared with what it was, so that no way of writing to it goes
unseen; all ranks agree, in one small message, that theirs is still the same. Tables that are alike
on all ranks need no message. On a GPU, where comparing waits for it, neither is compared while they
are the same objects, or views of them, and torch has counted no write to them; a plain index, to
which all ranks write alike, then needs no message either.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _torch, cache, comm
from ..comm import wire
from ..tensor.redistribute import local_of

_MOST = 64
# bytes of a long index, which is compared in so many turns
_LONG, _TURNS = 2**22, 16
V = TypeVar("V")


def waits(x: Tensor) -> bool:
    """Whether to read a tensor's numbers is to wait for its device."""
    return x.device.type != "cpu"


class _Stamp:
    """Tensor objects, and how many writes to each of them torch had counted."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.refs = tuple(map(weakref.ref, xs))
        self.versions = _versions(xs)

    def holds(self, xs: Sequence[Tensor]) -> bool:
        """Whether these are they, and nothing was written since."""
        same = len(xs) == len(self.refs) and all(
            ref() is x for ref, x in zip(self.refs, xs, strict=True)
        )
        return same and self.versions is not None and self.versions == _versions(xs)


def _versions(xs: Sequence[Tensor]) -> tuple[int, ...] | None:
    # of what was made in inference mode torch counts no writes
    return None if any(x.is_inference() for x in xs) else tuple(x._version for x in xs)


def _copy(x: Tensor) -> Tensor:
    """A long index in 4 bytes a number, which hold most."""
    if x.dtype == torch.int64 and x.nbytes >= _LONG and x.is_contiguous():
        short = x.int()
        if _same(short, x):
            return short
    return x.clone()


def _same(was: Tensor, x: Tensor) -> bool:
    if was.dtype == x.dtype:
        return torch.equal(was, x)
    if waits(x):
        # once for all of them
        return not bool((was != x).any())
    # some numbers at a time, exactly
    some = -(-x.numel() // _TURNS)
    pairs = zip(was.view(-1).split(some), x.view(-1).split(some), strict=True)
    return all(torch.equal(a.long(), b) for a, b in pairs)


class _Kept:
    """What was found of indices; that of indices that are gone is dropped."""

    def __init__(self) -> None:
        self.found: OrderedDict[Any, tuple[Any, tuple[Tensor, ...], Any]] = OrderedDict()
        self.stamps: dict[Any, _Stamp] = {}
        # how often anything was asked for; until when all ranks have what was found
        self.asked, self.until = 0, dict[Any, int]()

    def cache_clear(self) -> None:
        self.found.clear()
        self.stamps.clear()
        self.until.clear()

    def get(self, key: Any, at: Sequence[Tensor], owners: Sequence[Tensor] = ()) -> Any:
        """owners: what is asked for by the count of writes to it, where comparing waits."""
        if key not in self.found:
            return None
        ref, was, found = self.found[key]
        if ref.expired():
            return None
        stamped = bool(owners) and waits(at[0])
        if not (stamped and key in self.stamps and self.stamps[key].holds(owners)):
            if not all(map(_same, was, at)):
                return None
            if stamped:
                self.stamps[key] = _Stamp(owners)
        self.found.move_to_end(key)
        return found

    def on_all_ranks(self, key: Any, owners: Sequence[Tensor]) -> Any:
        """What every rank has that asks alike: of objects that nobody wrote to, soon after.

        A rank keeps the last _MOST, and may have dropped others for what is gone elsewhere already.
        """
        recent = self.asked <= self.until.get(key, 0)
        self.until[key] = self.asked + _MOST - 1
        if not (recent and key in self.stamps and self.stamps[key].holds(owners)):
            return None
        self.found.move_to_end(key)
        return self.found[key][-1]

    def put(
        self, key: Any, ref: Any, found: Any, at: Sequence[Tensor], owners: Sequence[Tensor] = ()
    ) -> None:
        for k in [k for k, (r, *_) in self.found.items() if r.expired()]:
            self._drop(k)
        self.found[key] = ref, tuple(map(_copy, at)), found
        self.found.move_to_end(key)
        if owners:
            self.stamps[key] = _Stamp(owners)
        while len(self.found) > _MOST:
            self._drop(next(iter(self.found)))

    def _drop(self, key: Any) -> None:
        del self.found[key]
        self.stamps.pop(key, None)
        self.until.pop(key, None)


class _Routes(dict[str, _Kept]):
    """Of each group of ranks, who ask alike."""

    def __missing__(self, group: str) -> _Kept:
        return self.setdefault(group, _Kept())

    def cache_clear(self) -> None:
        self.clear()


_kept, _routes = _Kept(), _Routes()
cache.register(_kept)
cache.register(_routes)


def are_kept() -> bool:
    """Whether there are routes that a step like the last one would find."""
    return any(kept.found for kept in _routes.values())


@cache.unseen
def route_of(index: Tensor, at: Tensor, key: Any, group: str, make: Callable[[], V]) -> V:
    """make(), the route of an index, of which this rank has the entries `at`; kept with it.

    key: what else the route depends on. group: all ranks that make it together.
    """
    # a route outlives the transforms of torch.func, which integers have no part in
    at, local = _torch.unwrapped(at), _torch.unwrapped(local_of(index))
    ref, full = _named(local, key)
    owners = [local if local._base is None else local._base]
    have = _routes[group]
    have.asked += 1
    if local is index and waits(at):
        found: V | None = have.on_all_ranks(full, owners)
        if found is not None:
            return found
    route: V | None = have.get(full, [at], owners)
    if comm.size(group) > 1:
        lacks = torch.tensor(int(route is None))
        if int(wire.agreed_number(lacks, at.device, group)):
            route = None
    if route is None:
        route = make()
        have.put(full, ref, route, [at], owners)
    return route


@cache.unseen
def kept(
    pattern: Sequence[Tensor], key: Any, make: Callable[[], V], owners: Sequence[Tensor] = ()
) -> V:
    """make(), kept while the first of some index tensors lives and they stay as they are.

    They are alike on all ranks, and make does not communicate: nothing has to be agreed on.
    owners: the tensor objects that have the pattern; default: the pattern's own.
    """
    ref, full = _named(pattern[0], key)
    owners = owners or pattern
    found: V | None = _kept.get(full, pattern, owners)
    if found is None:
        found = make()
        _kept.put(full, ref, found, pattern, owners)
    return found


def _named(x: Tensor, key: Any) -> tuple[Any, tuple[Any, ...]]:
    """A weak reference to the memory of an index, and what names it with its key."""
    ref = _torch.storage_ref(x)
    return ref, (ref.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, key)
