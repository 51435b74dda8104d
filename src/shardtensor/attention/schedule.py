"""Which queries see which keys, and which rank needs which block: pure integers."""

from __future__ import annotations

from typing import NamedTuple

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


@cached
def hops(
    n: int,
    q_starts: tuple[int, ...],
    q_sizes: tuple[int, ...],
    k_starts: tuple[int, ...],
    k_sizes: tuple[int, ...],
    causal: bool,
) -> tuple[int, ...]:
    """How many ranks on around the ring each block of keys must travel, to the last that needs it.

    After t hops block j is on rank (j + t) % n. A rank's tokens are one span or several, as many
    for each of the n ranks, listed rank by rank.
    """
    queries = per_rank(n, q_starts, q_sizes)
    found = []
    for j, block in enumerate(per_rank(n, k_starts, k_sizes)):
        furthest = 0
        for t in range(1, n):
            if any(
                pieces(rows, keys, first - start if causal else None)
                for first, rows in queries[(j + t) % n]
                for start, keys in block
            ):
                furthest = t
        found.append(furthest)
    return tuple(found)


@cached
def per_rank(n: int, starts: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Spans, ...]:
    """The spans (start, size) of each of n ranks."""
    each = len(starts) // n
    spans = tuple(zip(starts, sizes, strict=True))
    return tuple(spans[i : i + each] for i in range(0, len(spans), each))
