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
    rows: how many rows that is.
    sends: for each rank, the (start, length) rows of the local tensor that go to it, in its order.
    communicates: whether any rank receives rows of another (the same on all ranks).
    identity: whether every rank's window is its own shard (the same on all ranks).
    """

    pieces: tuple[Piece, ...]
    rows: int
    sends: tuple[tuple[tuple[int, int], ...], ...]
    communicates: bool
    identity: bool


def _joined(parts: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The same rows in as few pieces as it takes."""
    found: list[Piece] = []
    for p in parts:
        last = found[-1] if found else None
        if last and p.source == last.source != FILL and p.start == last.start + last.length:
            found[-1] = last._replace(length=last.length + p.length)
        else:
            found.append(p)
    return tuple(found)


@lru_cache(maxsize=8192)
def exchange(
    sizes: tuple[int, ...], starts: tuple[int, ...], stops: tuple[int, ...], wrap: bool, rank: int
) -> Exchange:
    """The plan by which every rank gets its ranges of global rows, [starts[i], stops[i]).

    Ranges are listed rank by rank, as many for each; rank r's window is its ranges in order.
    """
    each = len(starts) // len(sizes)
    ranges = [pieces(sizes, a, b, wrap) for a, b in zip(starts, stops, strict=True)]
    wanted = [sum(ranges[r : r + each], ()) for r in range(0, len(ranges), each)]
    sends = tuple(
        () if to == rank else tuple((p.start, p.length) for p in parts if p.source == rank)
        for to, parts in enumerate(wanted)
    )
    return Exchange(
        wanted[rank],
        sum(p.length for p in wanted[rank]),
        sends,
        any(p.source not in (r, FILL) for r, parts in enumerate(wanted) for p in parts),
        all(
            _joined(parts) == ((Piece(r, 0, n),) if n else ())
            for r, (parts, n) in enumerate(zip(wanted, sizes, strict=True))
        ),
    )
