"""Which keys a block mask lets queries see, by tiles, and so which travel: pure integers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..cache import cached
from .schedule import Spans

# rows that are computed together at least, whatever the tiles
LEAST = 128
# layouts whose ways are kept
MOST = 1024


class Part(NamedTuple):
    """Rows [start, stop) of a rank and the spans [start, stop) of what it holds that they see."""

    rows: tuple[int, int]
    keys: Spans


class Needs:
    """Tiles of `rows` queries and `keys` keys of which seen says whether any query sees any key."""

    def __init__(self, rows: int, keys: int, seen: Any) -> None:
        self.rows, self.keys, self.seen = rows, keys, seen
        self._kept: dict[Hashable, Any] = {}

    def of(self, queries: tuple[int, int], keys: tuple[int, int]) -> Spans:
        """The spans (start, size) of those keys that any of those queries (start, size) sees."""
        (q, rows), (k, size) = queries, keys
        if not rows or not size:
            return ()
        seen = self.seen[q // self.rows : -(-(q + rows) // self.rows)].any(0)
        return _runs(seen, self.keys, k, k + size)

    def parts(self, queries: tuple[int, int], held: Spans, limit: int) -> list[Part]:
        """How queries meet the keys that are held: a few rows at a time, at most limit scores."""
        (q, rows), found = queries, list[Part]()
        if not rows or not held:
            return found
        a = 0
        while a < rows:
            # to the end of the tile that has the last of so many rows
            b = min(rows, -(-(q + a + min(LEAST, rows - a)) // self.rows) * self.rows - q)
            seen = self.seen[(q + a) // self.rows : -(-(q + b) // self.rows)].any(0)
            spans, at = list[tuple[int, int]](), 0
            for start, size in held:
                for first, n in _runs(seen, self.keys, start, start + size):
                    spans.append((at + first - start, at + first - start + n))
                at += size
            found += _cut((a, b), tuple(spans), limit)
            a = b
        return found

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), once for a key."""
        if key not in self._kept:
            if len(self._kept) >= MOST:
                self._kept.clear()
            self._kept[key] = make()
        return self._kept[key]


@cached
def everything() -> Needs:
    """Where every query sees every key."""
    return _All(1, 1, None)


class _All(Needs):
    def of(self, queries: tuple[int, int], keys: tuple[int, int]) -> Spans:
        return (keys,) if queries[1] and keys[1] else ()

    def parts(self, queries: tuple[int, int], held: Spans, limit: int) -> list[Part]:
        total = sum(size for _, size in held)
        return _cut((0, queries[1]), ((0, total),), limit) if queries[1] and total else []


def _runs(seen: Any, tile: int, start: int, stop: int) -> Spans:
    """The spans (start, size) of seen tiles within [start, stop)."""
    first = start // tile
    own = np.concatenate(([False], seen[first : -(-stop // tile)], [False]))
    (edges,) = np.nonzero(own[1:] != own[:-1])
    found = []
    for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        low, high = max(start, (first + a) * tile), min(stop, (first + b) * tile)
        found.append((low, high - low))
    return tuple(found)


def _cut(rows: tuple[int, int], keys: Spans, limit: int) -> list[Part]:
    """A part in pieces of at most limit scores."""
    n = sum(b - a for a, b in keys)
    if not n:
        return []
    step = max(1, limit // n)
    ends = range(rows[0], rows[1], step)
    return [Part((a, min(a + step, rows[1])), keys) for a in ends]


class Way(NamedTuple):
    """What each step of a ring moves: step t takes keys t places on.

    steps: those in which any keys move. sent[t], got[t]: the spans that this place sends t places
    on, and that it gets from t places before, among all keys.
    """

    steps: tuple[int, ...]
    sent: tuple[Spans, ...]
    got: tuple[Spans, ...]


def way(needs: Needs, me: int, queries: Sequence[tuple[int, int]], keys: Spans) -> Way:
    """How keys travel between places that have these queries and keys, (start, size) of each."""

    def make() -> Way:
        n = len(queries)
        found = [
            t for t in range(1, n) if any(needs.of(queries[(i + t) % n], keys[i]) for i in range(n))
        ]
        sent = [needs.of(queries[(me + t) % n], keys[me]) for t in range(n)]
        got = [needs.of(queries[me], keys[(me - t) % n]) for t in range(n)]
        return Way(tuple(found), tuple(sent), tuple(got))

    found: Way = needs.kept((me, tuple(queries), tuple(keys)), make)
    return found
