"""Who sends which rows to whom: plans in plain integers, computed alike on every rank.

A plan names the few ranks that this one meets. It is made in one pass over the ranks, and found
again by sizes and windows that keep their hash (`spec.Kept`), so that a call does not know how many
ranks there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..cache import cached
from ..cuts import Cut, Kept, cut, table

FILL = -1  # the source of rows that lie outside the global range
FEW = 16  # ranks that give something to one: fewer are sent to by messages of their own

Windows = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """`length` rows that start at row `start` of the local tensor of rank `source`."""

    source: int
    start: int
    length: int


def pieces(sizes: Sequence[int], start: int, stop: int, wrap: bool) -> tuple[Piece, ...]:
    """The pieces that make up the global rows [start, stop), in order.

    Rows outside [0, sum(sizes)) are periodic images if `wrap`, else FILL pieces.
    """
    offsets = cut(sizes).offsets
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


@dataclass(frozen=True, eq=False)
class Exchange:
    """One rank's part of a window exchange; kept plans are compared by identity.

    pieces: what makes up this rank's window, in order.
    rows: how many rows that is.
    sends: for each rank that gets any, in order, the (start, length) rows of the local tensor.
    gets: for each rank that gives any, in order, the lengths of what comes.
    communicates: whether any rank receives rows of another (the same on all ranks).
    few: whether every rank gets rows from few ranks only (the same on all ranks).
    identity: whether every rank's window is its own shard (the same on all ranks).
    whole: whether every rank's window is the whole dim (the same on all ranks).
    sizes, windows, wrap: what it is the plan of.
    """

    pieces: tuple[Piece, ...]
    rows: int
    sends: dict[int, tuple[tuple[int, int], ...]]
    gets: dict[int, tuple[int, ...]]
    communicates: bool
    few: bool
    identity: bool
    whole: bool
    sizes: Cut
    windows: Windows
    wrap: bool


@cached
def exchange(sizes: tuple[int, ...], windows: Windows, wrap: bool, rank: int) -> Exchange:
    """The plan by which every rank gets its ranges of global rows, [start, stop) of windows.

    Ranges are listed rank by rank, as many for each; rank r's window is its ranges in order.
    """
    sizes = cut(sizes)
    n, total = len(sizes), sizes.offsets[-1]
    each = len(windows) // n
    own = windows[rank * each : (rank + 1) * each]
    starts, stops = table(windows).reshape(n, each, 2).transpose(2, 0, 1)
    low, high = sizes.edges[:-1, None], sizes.edges[1:, None]
    if each == 1 and n > 1 and total and (starts == 0).all() and (stops == total).all():
        # as many pieces as ranks, of which none is asked for by itself
        return Exchange((), total, {}, {}, True, False, False, True, sizes, windows, wrap)
    wrap = wrap and total > 0
    begin, end = sizes.offsets[rank : rank + 2]
    mine = [p for a, b in own for p in pieces(sizes, a, b, wrap)]
    gets: dict[int, list[int]] = {}
    for p in mine:
        if p.source not in (rank, FILL):
            gets.setdefault(p.source, []).append(p.length)
    sends: dict[int, list[tuple[int, int]]] = {}
    for to, part in _asked(starts, stops, begin, end, total if wrap else 0):
        if to != rank:
            sends.setdefault(to, []).append(part)
    return Exchange(
        tuple(mine),
        sum(p.length for p in mine),
        {to: tuple(parts) for to, parts in sends.items()},
        {r: tuple(gets[r]) for r in sorted(gets)},
        _crosses(starts, stops, low, high, total, wrap),
        _most(starts, stops, sizes, wrap) <= FEW,
        _is_identity(starts, stops, low, high, total, wrap),
        False,
        sizes,
        windows,
        wrap,
    )


def _asked(
    starts: Any, stops: Any, low: int, high: int, period: int
) -> Iterator[tuple[int, tuple[int, int]]]:
    """(rank, (local row, rows)) of what ranges name of the global rows [low, high)."""
    if low == high:
        return
    # the first image of these rows that ends after a range starts
    first = (starts - high) // period + 1 if period else np.zeros_like(starts)
    meets = (first * period + low < stops) & (first * period + high > starts) & (starts < stops)
    for r, i in zip(*(x.tolist() for x in np.nonzero(meets)), strict=True):
        start, stop, image = int(starts[r, i]), int(stops[r, i]), int(first[r, i])
        while image * period + low < stop:
            a = max(start - image * period, low)
            b = min(stop - image * period, high)
            yield r, (a - low, b - a)
            if not period:
                break
            image += 1


def _crosses(starts: Any, stops: Any, low: Any, high: Any, total: int, wrap: bool) -> bool:
    """Whether any rank's ranges have rows of another rank."""
    if wrap:
        first = starts % total
        last = first + stops - starts
        here = ((first >= low) & (last <= high)) | (high - low == total)
        return bool(((starts < stops) & ~here).any())
    first, last = starts.clip(0, total), stops.clip(0, total)
    return bool(((first < last) & ((first < low) | (last > high))).any())


def _most(starts: Any, stops: Any, sizes: Cut, wrap: bool) -> int:
    """The most ranks between the first and the last that one rank's ranges have rows of."""
    n, total = len(sizes), sizes.offsets[-1]

    def rank(rows: Any) -> Any:
        at = rows % total if wrap else rows.clip(0, max(0, total - 1))
        turns = rows // total * n if wrap else 0
        return turns + np.searchsorted(sizes.edges, at, "right")

    return int(((rank(stops - 1) - rank(starts) + 1) * (starts < stops)).sum(1).max())


def _is_identity(starts: Any, stops: Any, low: Any, high: Any, total: int, wrap: bool) -> bool:
    """Whether every rank's ranges, one after the other, are the rows that it has."""
    lengths = (stops - starts).clip(0)
    expected = low + lengths.cumsum(1) - lengths
    found = starts % total if wrap else starts
    in_order = ((lengths == 0) | (found == expected)).all()
    return bool(in_order and (lengths.sum(1, keepdims=True) == high - low).all())


def windows_of(starts: Sequence[int], stops: Sequence[int]) -> Windows:
    """Ranges from where they start and stop."""
    return Kept(zip(starts, stops, strict=True))


@cached
def whole(sizes: Cut) -> Windows:
    """Every rank's window the whole dim."""
    return Kept(((0, sizes.offsets[-1]),) * len(sizes))


@cached
def spread(sizes: Cut, numel: int, but: int) -> list[int]:
    """How much of a tensor of `numel` for each row goes to every rank, none to rank `but`."""
    found = [n * numel for n in sizes]
    if but >= 0:
        found[but] = 0
    return found
