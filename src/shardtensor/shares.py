"""Sizes of shards for ranks of unlike speed and rows of unlike work: contiguous and exact.

The busiest rank is to have as little as it can. With the ranks in order that is the problem of
chains on chains: it is found by bisection on what the busiest may have, where each probe lets one
rank after the other take all that it may (Pinar and Aykanat, "Fast optimal load balancing
algorithms for 1D partitioning", J. Parallel Distrib. Comput. 64, 974 (2004); with unlike speeds
Pinar, Tabak and Aykanat, ibid. 68, 1473 (2008)). A probe that succeeds lowers the bound to what was
really taken, one that fails raises it to the next that would change anything: in whole numbers, so
the end of the search is the optimum. O(rows) for sums, then O(ranks log rows) for each probe.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from math import inf, isfinite, lcm
from typing import Any

import numpy as np
import torch

from .cuts import Cut, cut

# sums of weights that are taken as they are: twice as much is a whole number of 64 bits still
_MOST = 2**61


def balanced(
    size: int,
    ranks: int,
    *,
    weights: Any = None,
    speeds: Sequence[float] | None = None,
    multiple: int = 1,
    most: int | Sequence[int] | None = None,
) -> Cut:
    """Sizes of a dim's shards, one for each rank, with which the slowest takes the least time.

    weights: the work of each row, a tensor, an array or numbers, none below 0 (default: all alike).
    speeds: of the ranks, in any unit; 0 for one that is to get no work. multiple: shards start at
    multiples of it: of a patch, or of the product of strides. most: rows that a rank can hold, one
    number for all or one for each.

    The time is the least that any contiguous shards in the order of the ranks have; weights that
    are not whole numbers count to 2**-32 of the largest, or finer below a billion rows. Of several
    such cuts that one which is closest to equal times; rows without weight may then lie anywhere,
    and if no row has weight all count alike. Nothing is communicated: the same arguments give the
    same sizes. Raises ValueError for arguments that do not fit, and where no rank can hold a row.
    """
    if size < 0 or ranks < 1 or multiple < 1:
        raise ValueError(f"{size} rows for {ranks} ranks in multiples of {multiple}")
    rate = _speeds(speeds, ranks)
    limits = _limits(most, ranks, size)
    rows = _rows(size, multiple, weights)
    edges = _edges(rows, rate, limits)
    return cut([rows.row(b) - rows.row(a) for a, b in pairwise(edges)])


def loads(
    sizes: Sequence[int], *, weights: Any = None, speeds: Sequence[float] | None = None
) -> list[float]:
    """The time of each rank for its shard: the work of its rows over its speed.

    In the unit of weights over that of speeds; infinite for work on a rank of speed 0. Nothing is
    communicated. Raises ValueError for arguments that do not fit.
    """
    if weights is None:
        work = [float(n) for n in sizes]
    else:
        w, ends = _numbers(weights, sum(sizes)), cut(sizes).offsets
        work = [float(w[a:b].sum()) for a, b in pairwise(ends)]
    if speeds is None:
        return work
    if len(speeds) != len(work):
        raise ValueError(f"{len(speeds)} speeds for {len(work)} shards")
    return [w / s if s else (inf if w else 0.0) for w, s in zip(work, speeds, strict=True)]


@dataclass
class _Rows:
    """Rows in blocks that stay together. sums: the work before each block, and of all."""

    size: int
    multiple: int
    sums: Any

    @property
    def blocks(self) -> int:
        return len(self.sums) - 1

    def row(self, block: int) -> int:
        """Where a block starts."""
        return min(block * self.multiple, self.size)

    def block(self, row: int) -> int:
        """How many blocks end up to a row."""
        return self.blocks if row >= self.size else row // self.multiple

    def work(self, a: int, b: int) -> int:
        """Of the blocks [a, b)."""
        return int(self.sums[b]) - int(self.sums[a])

    def furthest(self, start: int, work: int, most: int) -> int:
        """The last end of blocks from `start` on of so much work, and rows, at most."""
        end = bisect_right(self.sums, int(self.sums[start]) + work, start) - 1
        return min(end, self.limit(start, most))

    def limit(self, start: int, most: int) -> int:
        """The same by rows alone."""
        return max(start, self.block(self.row(start) + most))

    def nearest(self, end: int, work: int, most: int) -> int:
        """The first start of blocks up to `end` of so much work, and rows, at most."""
        start = bisect_left(self.sums, int(self.sums[end]) - work, 0, end)
        return min(end, max(start, -(-(self.row(end) - most) // self.multiple)))

    def at(self, work: Fraction) -> int:
        """The block before which there is about so much work."""
        i = min(bisect_left(self.sums, -(-work.numerator // work.denominator)), self.blocks)
        return i - (i > 0 and work - int(self.sums[i - 1]) <= int(self.sums[i]) - work)


def _edges(rows: _Rows, speeds: list[int], limits: list[int]) -> list[int]:
    """Where every rank's blocks start, and the end."""
    n, total = rows.blocks, rows.work(0, rows.blocks)
    bound = _least(rows, speeds, limits)
    may = [min(total, bound.numerator * s // bound.denominator) for s in speeds]
    # from which block on the ranks that follow can take all
    low = [n]
    for work, most in zip(may[::-1], limits[::-1], strict=True):
        low.append(rows.nearest(low[-1], work, most))
    low.reverse()
    edges = [0]
    sums = list(accumulate(speeds))
    for k, (work, most) in enumerate(zip(may, limits, strict=True)):
        wanted = rows.at(Fraction(total * sums[k], sums[-1]))
        last = rows.furthest(edges[-1], work, most)
        edges.append(min(max(wanted, low[k + 1], edges[-1]), last))
    return edges


def _least(rows: _Rows, speeds: list[int], limits: list[int]) -> Fraction:
    """The least time of the slowest rank."""
    total = rows.work(0, rows.blocks)
    above = Fraction(total, min(s for s in speeds if s))
    fits, high, _ = _probe(rows, speeds, limits, above)
    if not fits:
        raise ValueError(
            f"{rows.size} rows do not fit ranks of at most {limits} rows, in multiples of "
            f"{rows.multiple}"
        )
    low = Fraction(total, sum(speeds))
    while low < high:
        fits, taken, following = _probe(rows, speeds, limits, (low + high) / 2)
        if fits:
            high = taken
        else:
            assert following is not None
            low = following
    return high


def _probe(
    rows: _Rows, speeds: list[int], limits: list[int], bound: Fraction
) -> tuple[bool, Fraction, Fraction | None]:
    """Whether ranks that take as much as `bound` of time lets them take all; the longest time that
    one then has; the next bound with which anything would change.
    """
    total, at = rows.work(0, rows.blocks), 0
    longest, following = Fraction(0), None
    for speed, most in zip(speeds, limits, strict=True):
        may = min(total, bound.numerator * speed // bound.denominator)
        end = rows.furthest(at, may, most)
        if speed:
            longest = max(longest, Fraction(rows.work(at, end), speed))
            if end < rows.limit(at, most):
                more = Fraction(rows.work(at, end + 1), speed)
                following = more if following is None else min(following, more)
        at = end
    return at == rows.blocks, longest, following


def _speeds(speeds: Sequence[float] | None, ranks: int) -> list[int]:
    """Whole numbers in the same proportion, exactly."""
    if speeds is None:
        return [1] * ranks
    given = [float(s) for s in speeds]
    if len(given) != ranks or not all(isfinite(s) and s >= 0 for s in given) or not any(given):
        raise ValueError(
            f"speeds {given} of {ranks} ranks: one of 0 or more each, not all of them 0"
        )
    exact = [Fraction(s) for s in given]
    unit = lcm(*(s.denominator for s in exact))
    return [int(s * unit) for s in exact]


def _limits(most: int | Sequence[int] | None, ranks: int, size: int) -> list[int]:
    given = [size] * ranks if most is None else [most] * ranks if isinstance(most, int) else [*most]
    if len(given) != ranks or min(given) < 0:
        raise ValueError(f"most {most} of {ranks} ranks: rows of 0 or more, of all or of each")
    return [int(n) for n in given]


def _rows(size: int, multiple: int, weights: Any) -> _Rows:
    work = None if weights is None else _integers(_numbers(weights, size))
    if work is None or not work.any():
        if multiple == 1:
            return _Rows(size, 1, range(size + 1))
        starts = np.arange(-(-size // multiple) + 1, dtype=np.int64) * multiple
        return _Rows(size, multiple, np.minimum(starts, size))
    if multiple > 1:
        work = np.add.reduceat(work, np.arange(0, size, multiple))
    return _Rows(size, multiple, np.concatenate([[0], work.cumsum()]))


def _numbers(weights: Any, size: int) -> Any:
    """As a numpy array. Raises ValueError unless there is one of 0 or more for each row."""
    if isinstance(weights, torch.Tensor):
        whole = weights.detach().cpu()
        weights = whole.double() if whole.is_floating_point() else whole
    found = np.asarray(weights)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"weights of {found.dtype}: numbers are needed")
    if found.dtype.kind == "b":
        found = found.astype(np.int64)
    if found.shape != (size,) or (size and not (np.isfinite(found).all() and found.min() >= 0)):
        raise ValueError(f"weights {found.shape} of {size} rows: one of 0 or more for each")
    return found


def _integers(weights: Any) -> Any:
    """Whole numbers in the same proportion: exactly, where they are whole."""
    if not len(weights):
        return weights.astype(np.int64)
    whole = weights.dtype.kind in "iu" or bool((weights == np.rint(weights)).all())
    if whole and weights.sum(dtype=np.float64) < _MOST:
        return weights.astype(np.int64)
    wide = weights.astype(np.float64)
    bits = 61 - len(wide).bit_length()
    return np.rint(wide / max(wide.max(), 5e-324) * 2.0**bits).astype(np.int64)
