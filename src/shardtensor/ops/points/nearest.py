"""The nearest points of other rows, on all ranks: points travel, queries stay.

Every rank sorts its points along a curve and cuts them into chunks, whose bounding boxes all ranks
know. It searches its own points first, then in turn those of the rank 1, 2, ... places further on,
which sends only the chunks that the asking rank names: those within reach of a query, that is as
near as its k-th neighbour so far. Boxes are compared with the arithmetic of distances, whose
rounding is monotone, so that nothing is lost at a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _torch, comm
from ...comm import wire
from ...errors import UnsupportedOpError
from .curves import morton_order
from .pairs import Met, pack, squared, unpack, wide

NONE = torch.iinfo(torch.int64).max  # the index of no point


class Found:
    """The best k points so far for each of m queries, the best first.

    The best are the nearest within a squared distance, of equals the first; or with `first` those
    of lowest index within it. counts: all points seen within it.
    """

    def __init__(self, queries: Tensor, k: int, within: float | None, first: bool) -> None:
        shape = (len(queries), k)
        self.queries, self.k, self.first = queries, k, first
        self.within = None if within is None else queries.new_tensor(within)
        self.d2 = queries.new_full(shape, inf)
        self.index = torch.full(shape, NONE, device=queries.device)
        self.counts = self.index.new_zeros(len(queries))

    def reach(self, rows: Tensor | slice) -> Tensor:
        """How far, squared, a point may be to count for each of these queries."""
        if self.within is not None:
            return self.within.expand(len(self.d2[rows]))
        return self.d2[rows, -1]

    def add(self, rows: Tensor, points: Tensor, index: Tensor) -> None:
        """Points (n, D) with their indices (n,) for some of the queries."""
        d2 = squared(self.queries[rows], points)
        at = index.expand_as(d2)
        if self.within is not None:
            inside = d2 <= self.within
            self.counts[rows] += inside.sum(1)
            d2, at = d2.masked_fill(~inside, inf), at.masked_fill(~inside, NONE)
        k = min(self.k, len(points))
        if self.first:
            at, by = at.topk(k, 1, largest=False)
            d2 = d2.gather(1, by)
        else:
            d2, at = _smallest(d2, at, k)
        d2, at = torch.cat([self.d2[rows], d2], 1), torch.cat([self.index[rows], at], 1)
        at, by = at.sort(1)
        d2 = d2.gather(1, by)
        if not self.first:
            d2, at = _sorted(d2, at)
        self.d2[rows], self.index[rows] = d2[:, : self.k], at[:, : self.k]


def _smallest(d2: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k columns that come first by (d2, index), in any order."""
    found, at = d2.topk(k, 1, largest=False)
    at = index.gather(1, at)
    # topk takes any of those equal to the last
    last = found.amax(1)
    tied = ((d2 <= last[:, None]).sum(1) > k) & (last < inf)
    if tied.any():
        ordered, by = index[tied].sort(1)
        best, ordered = _sorted(d2[tied].gather(1, by), ordered)
        found[tied], at[tied] = best[:, :k], ordered[:, :k]
    return found, at


def _sorted(d2: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Columns by distance, equals as they were."""
    d2, by = d2.sort(dim=1, stable=True)
    return d2, index.gather(1, by)


class Boxes(NamedTuple):
    """The bounding boxes of chunks: (chunks, D) each."""

    low: Tensor
    high: Tensor

    def gaps(self, queries: Tensor) -> Tensor:
        """Squared distances (m, chunks) from queries to boxes."""
        total = queries.new_zeros(len(queries), len(self.low))
        for x, low, high in zip(
            queries.unbind(1), self.low.unbind(1), self.high.unbind(1), strict=True
        ):
            x = x[:, None]
            gap = torch.maximum(low - x, x - high).clamp_(min=0)
            total += gap.mul_(gap)
        return total


def _boxes(points: Tensor, chunk: int) -> Boxes:
    if not len(points):
        return Boxes(points, points)
    parts = points.split(chunk)
    return Boxes(torch.stack([p.amin(0) for p in parts]), torch.stack([p.amax(0) for p in parts]))


def _blocks(found: Found, boxes: Boxes, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """For some queries at a time: the number of the first and its gaps to the boxes."""
    for start in range(0, len(found.queries), chunk):
        yield start, boxes.gaps(found.queries[start : start + chunk])


def _scan(found: Found, packed: Tensor, start: int, boxes: Boxes, chunk: int) -> None:
    """Search chunks of points, their indices counted from `start`; the nearest chunks first."""
    parts = packed.split(chunk)
    if not len(packed):
        return
    for row, gaps in _blocks(found, boxes, chunk):
        nearest, order = gaps.amin(0).sort()
        here = slice(row, row + chunk)
        for gap, c in zip(nearest.tolist(), order.tolist(), strict=True):
            reach = found.reach(here)
            if gap > reach.max():
                break
            rows = (gaps[:, c] <= reach).nonzero()[:, 0]
            if len(rows):
                points, index = unpack(parts[c], found.queries.dtype)
                found.add(rows + row, points, index + start)


def _named(found: Found, boxes: Boxes, chunk: int) -> Tensor:
    """Which chunks (chunks,) are within reach of a query."""
    named = torch.zeros(len(boxes.low), dtype=torch.bool, device=found.queries.device)
    if len(named):
        for row, gaps in _blocks(found, boxes, chunk):
            named |= (gaps <= found.reach(slice(row, row + chunk))[:, None]).any(0)
    return named


@torch.no_grad()
def nearest(met: Met, k: int, within: float | None, chunk: int, first: bool = False) -> Found:
    """The best k points (within a squared distance) for this rank's queries; see `Found`."""
    if _torch.is_tracing():
        raise UnsupportedOpError(
            "a search for neighbours depends on values and cannot be compiled: leave it out of "
            "st.compile"
        )
    queries, points, sizes = wide(met.asking.detach()), wide(met.rows.detach()), met.sizes
    # chunks of queries are compact too
    given = morton_order(queries, 63)
    found = Found(queries[given], k, within, first)
    if not sum(sizes):
        return found
    order = morton_order(points, 63)
    packed, me = pack(points[order], order, sizes), comm.rank(met.group)
    own = _boxes(points[order], chunk)
    _scan(found, packed, sum(sizes[:me]), own, chunk)
    if len(sizes) > 1:
        _visit(found, packed, own, met, chunk)
    back = given.argsort()
    found.d2, found.index, found.counts = (x[back] for x in (found.d2, found.index, found.counts))
    return found


def _visit(found: Found, packed: Tensor, own: Boxes, met: Met, chunk: int) -> None:
    """Search the points of all other ranks."""
    sizes, group = met.sizes, met.group
    n, me = len(sizes), comm.rank(group)
    chunks = [-(-size // chunk) for size in sizes]
    ends = [comm.gather(end, 0, chunks, group).split(chunks) for end in own]
    boxes = [Boxes(*pair) for pair in zip(*ends, strict=True)]
    # rounds in which no rank needs anything are left out by all
    needs = [bool(_named(found, boxes[(me + step) % n], chunk).any()) for step in range(n)]
    busy = comm.reduce(torch.tensor(needs, device=packed.device).int(), group, "max").tolist()
    for step in range(1, n):
        if not busy[step]:
            continue
        owner, asker = (me + step) % n, (me - step) % n
        named = _named(found, boxes[owner], chunk)
        asked = _send(named, owner, asker, (chunks[me],), group)
        parts = packed.split(chunk)
        reply = torch.cat([packed[:0], *(parts[c] for c in asked.nonzero()[:, 0].tolist())])
        lengths = [min(chunk, sizes[owner] - c * chunk) for c in named.nonzero()[:, 0].tolist()]
        came = _send(reply, asker, owner, (sum(lengths), packed.shape[1]), group)
        near = Boxes(*(end[named] for end in boxes[owner]))
        _scan(found, came, sum(sizes[:owner]), near, chunk)


def _send(x: Tensor, to: int, source: int, shape: tuple[int, ...], group: str) -> Tensor:
    """x to one rank, and what another sends here."""
    return wire.exchange({to: [x]}, {source: [shape]}, x, group, "points")[source][0]
