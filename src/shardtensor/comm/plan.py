"""Who sends which rows to whom: plans in plain integers, computed alike on every rank."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

FILL = -1  # the source of rows that lie outside the global range


class Piece(NamedTuple):
    """`length` rows that start at row `start` of the local tensor of rank `source`."""

    source: int
    start: int
    length: int


@lru_cache(maxsize=8192)
def pieces(sizes: tuple[int, ...], start: int, stop: int, wrap: bool) -> tuple[Piece, ...]:
    """The pieces that make up the global rows [start, stop), in order.

    Rows outside [0, sum(sizes)) are periodic images if `wrap`, else FILL pieces.
    """
    offsets = (0, *accumulate(sizes))
    total = offsets[-1]
    found = []
    row = start
    while row < stop:
        if wrap and total:
            at = row % total
        elif row < 0 or row >= total:
            end = stop if row >= total else min(stop, 0)
            found.append(Piece(FILL, 0, end - row))
            row = end
            continue
        else:
            at = row
        source = bisect_right(offsets, at) - 1
        length = min(offsets[source + 1] - at, stop - row)
        found.append(Piece(source, at - offsets[source], length))
        row += length
    return tuple(found)


class Exchange(NamedTuple):
    """One rank's part of a window exchange.

    pieces: what makes up this rank's window, in order.
    sends: for each rank, the (start, length) rows of the local tensor that go to it, in its order.
    communicates: whether any rank receives rows of another (the same on all ranks).
    identity: whether every rank's window is its own shard (the same on all ranks).
    """

    pieces: tuple[Piece, ...]
    sends: tuple[tuple[tuple[int, int], ...], ...]
    communicates: bool
    identity: bool


@lru_cache(maxsize=8192)
def exchange(
    sizes: tuple[int, ...], starts: tuple[int, ...], stops: tuple[int, ...], wrap: bool, rank: int
) -> Exchange:
    """The plan by which every rank r gets the global rows [starts[r], stops[r])."""
    wanted = [pieces(sizes, a, b, wrap) for a, b in zip(starts, stops, strict=True)]
    sends = tuple(
        () if to == rank else tuple((p.start, p.length) for p in parts if p.source == rank)
        for to, parts in enumerate(wanted)
    )
    return Exchange(
        wanted[rank],
        sends,
        any(p.source not in (r, FILL) for r, parts in enumerate(wanted) for p in parts),
        all(
            parts == ((Piece(r, 0, n),) if n else ())
            for r, (parts, n) in enumerate(zip(wanted, sizes, strict=True))
        ),
    )
