"""How a dim is cut: the sizes of its shards, which keep their hash and what follows from them.

A spec names them, and so do the plans of exchanges, which are found by them: what has been asked
once is answered without a look at every shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import Any, TypeVar

import numpy as np

_T = TypeVar("_T")
# of numbers alone: what holds in one world holds in all
_once = lru_cache(maxsize=4096)


class Kept(tuple[_T, ...]):
    """A tuple that keeps its hash: plans are found by long ones at once."""

    @cached_property
    def _kept(self) -> int:
        return tuple.__hash__(self)

    def __hash__(self) -> int:
        return self._kept

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, Kept) and self._kept != other._kept:
            return False
        return tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> Any:
        return type(self), (tuple(self),)


class Cut(Kept[int]):
    """The sizes of all shards of a dim; what follows from them is computed once."""

    @cached_property
    def offsets(self) -> Kept[int]:
        """Where every shard starts, and the end: len(sizes) + 1 ascending integers."""
        return Kept((0, *accumulate(self)))

    @cached_property
    def least(self) -> int:
        """The smallest size."""
        return min(self)

    @cached_property
    def edges(self) -> Any:
        """The offsets as a numpy array."""
        return np.array(self.offsets, dtype=np.int64)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first, count, size) of the shards of the same size beside each other; no empty ones."""
        edges = np.flatnonzero(np.diff(np.diff(self.edges))) + 1
        firsts = [0, *edges.tolist()] if self else []
        ends = [*firsts[1:], len(self)]
        return tuple((a, b - a, self[a]) for a, b in zip(firsts, ends, strict=False) if self[a])


def pairs(starts: Any, stops: Any) -> Kept[tuple[int, int]]:
    """Two numpy arrays as pairs of numbers."""
    return Kept(zip(starts.ravel().tolist(), stops.ravel().tolist(), strict=True))


def table(windows: Sequence[tuple[int, int]]) -> Any:
    """Pairs of numbers as a numpy array (pairs, 2)."""
    return np.fromiter(chain.from_iterable(windows), np.int64, 2 * len(windows)).reshape(-1, 2)


@_once
def _cut(sizes: tuple[int, ...]) -> Cut:
    return Cut(sizes)


def cut(sizes: Iterable[int]) -> Cut:
    """Sizes as a `Cut`; equal ones are the same object while it is in use."""
    return sizes if type(sizes) is Cut else _cut(tuple(sizes))


@_once
def scaled(sizes: Cut, times: int, per: int) -> Cut:
    """Sizes with `times` rows in the place of each `per` rows."""
    return cut([n * times // per for n in sizes])


@_once
def clipped(sizes: Cut, start: int, stop: int) -> Cut:
    """What every shard has of the rows [start, stop)."""
    return cut(np.diff(sizes.edges.clip(start, stop)).tolist())


@_once
def windows(sizes: Cut, before: int, after: int) -> Kept[tuple[int, int]]:
    """The rows [start, stop) of every shard, with so many before and after them."""
    return pairs(sizes.edges[:-1] - before, sizes.edges[1:] + after)


@_once
def chunk_sizes(size: int, parts: int) -> Cut:
    """Sizes that `torch.chunk` gives, padded with zeros: chunk_sizes(5, 4) == (2, 2, 1, 0)."""
    step = -(-size // parts)
    full = size // step if step else 0
    rest = (size - full * step,) if full < parts else ()
    return cut((step,) * full + rest + (0,) * (parts - full - len(rest)))


def nested_chunk_sizes(size: int, parts: Sequence[int]) -> Cut:
    """Shard sizes when each mesh axis in turn chunks what the axes before it left."""
    return _nested(size, tuple(parts))


@_once
def _nested(size: int, parts: tuple[int, ...]) -> Cut:
    if len(parts) == 1:
        return chunk_sizes(size, parts[0])
    sizes: tuple[int, ...] = (size,)
    for n in parts:
        sizes = tuple(chain.from_iterable(chunk_sizes(block, n) for block in sizes))
    return cut(sizes)
