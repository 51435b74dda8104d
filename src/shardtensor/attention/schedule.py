"""Which queries see which keys, and which rank needs which block: pure integers."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ..cache import cached

# (start, size) of tokens
Spans = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """Rows of queries that meet columns of keys: all with all, or below a square's diagonal."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    triangle: bool = False


@cached
def pieces(rows: int, keys: int, shift: int | None) -> tuple[Piece, ...]:
    """The parts of a block of scores that are not masked.

    shift: query i sees the keys j <= i + shift; None: every query sees every key. Triangles are
    square, so kernels agree on them whether they align a causal mask top left or bottom right.
    """
    if not rows or not keys:
        return ()
    if shift is None or shift >= keys - 1:
        return (Piece((0, rows), (0, keys)),)
    first = max(0, -shift)
    if first >= rows:
        return ()
    left = first + shift
    side = min(rows - first, keys - left)
    found = [Piece((first, first + side), (left, left + side), True)]
    if left:
        found.append(Piece((first, first + side), (0, left)))
    if first + side < rows:
        found.append(Piece((first + side, rows), (0, keys)))
    return tuple(found)


class Laid(NamedTuple):
    """How queries and keys lie on the n ranks of a ring.

    queries, keys: the spans (start, size) of each rank. held: how many keys each has. hops: how
    many ranks on each block of keys must travel, to the last that needs it. steps: the most hops.
    firsts, lasts: a rank needs the blocks whose first does not lie behind its last.
    """

    queries: tuple[Spans, ...]
    keys: tuple[Spans, ...]
    held: tuple[int, ...]
    hops: tuple[int, ...]
    steps: int
    firsts: tuple[int, ...]
    lasts: tuple[int, ...]

    def sees(self, rank: int, block: int) -> bool:
        """Whether a rank needs a block of keys."""
        return self.lasts[rank] >= self.firsts[block]


@cached
def laid(
    n: int,
    q_starts: tuple[int, ...],
    q_sizes: tuple[int, ...],
    k_starts: tuple[int, ...],
    k_sizes: tuple[int, ...],
    causal: bool,
) -> Laid:
    """The spans of each rank, listed rank by rank, as many for each, and where keys must go."""
    keys = _per_rank(n, k_starts, k_sizes)
    held = tuple([sum([size for _, size in spans]) for spans in keys])
    first, last = _ends(n, q_starts, q_sizes, k_starts, k_sizes, causal)
    far = _hops(n, first, last)
    ends = tuple(first.tolist()), tuple(last.tolist())
    return Laid(_per_rank(n, q_starts, q_sizes), keys, held, far, max(far), *ends)


def _hops(n: int, first: Any, last: Any) -> tuple[int, ...]:
    """How many ranks on around the ring each block of keys must travel, to the last that needs it.

    After t hops block j is on rank (j + t) % n. A rank needs a block if the last of its queries
    sees the first of its keys.
    """
    # tops[l][i]: the largest of the 2^l ranks up to rank i, twice around the ring
    tops, width = [np.concatenate((last, last))], 1
    while 2 * width < n:
        top, width = tops[-1].copy(), 2 * width
        np.maximum(top[width // 2 :], tops[-1][: -(width // 2)], out=top[width // 2 :])
        tops.append(top)
    # from the rank before its own backwards, over ranks that do not need it
    at = np.arange(n, 2 * n) - 1
    for top in reversed(tops):
        inside = at - width >= np.arange(n)
        at = np.where(inside & (top[at] < first), at - width, at)
        width //= 2
    needed = (at > np.arange(n)) & (np.concatenate((last, last))[at] >= first)
    return tuple(np.where(needed, at - np.arange(n), 0).tolist())


@cached
def teams(n: int, size: int, folded: bool) -> tuple[int, ...]:
    """The ranks of a ring in teams of `size`, one team after the other, each ascending.

    folded: as many ranks from the front as from the back, so that under a causal mask, of which
    late queries see more keys, teams have about the same work.
    """
    count, half = n // size, size // 2 if folded else 0
    found = list[int]()
    for i in range(count):
        middle = half * count + i * (size - 2 * half)
        found += range(i * half, (i + 1) * half)
        found += range(middle, middle + size - 2 * half)
        found += range(n - (i + 1) * half, n - i * half)
    return tuple(found)


@cached
def seated(spans: Spans, order: tuple[int, ...], size: int) -> Spans:
    """The spans of each team of so many ranks, as many for each; adjacent ones are one."""
    found = []
    for at in range(0, len(order), size):
        own: list[tuple[int, int]] = []
        for start, length in (spans[r] for r in order[at : at + size]):
            if own and sum(own[-1]) == start:
                own[-1] = own[-1][0], own[-1][1] + length
            elif length:
                own.append((start, length))
        found.append(own)
    most = max(1, *(len(own) for own in found))
    return tuple(chain.from_iterable((*own, *[(0, 0)] * (most - len(own))) for own in found))


def _ends(
    n: int,
    q_starts: tuple[int, ...],
    q_sizes: tuple[int, ...],
    k_starts: tuple[int, ...],
    k_sizes: tuple[int, ...],
    causal: bool,
) -> tuple[Any, Any]:
    """The first key and the last query of each rank, beyond all others where it has none."""
    firsts, lasts = np.array(k_starts), np.array(q_starts) + np.array(q_sizes) - 1
    if not causal:
        firsts, lasts = np.zeros_like(firsts), np.zeros_like(lasts)
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    first = np.where(np.array(k_sizes) > 0, firsts, high).reshape(n, -1).min(1)
    last = np.where(np.array(q_sizes) > 0, lasts, low).reshape(n, -1).max(1)
    return first, last


def _per_rank(n: int, starts: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Spans, ...]:
    each = len(starts) // n
    spans = tuple(zip(starts, sizes, strict=True))
    return tuple([spans[i : i + each] for i in range(0, len(spans), each)])
