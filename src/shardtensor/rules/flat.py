"""Flat positions: of one rank's tensor as of the whole one, and as coordinates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..spec import Spec

# what takes more elements is moved in as many parts
_LARGE, _PARTS = 2**18, 8


def coordinates(at: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Flat positions in a row-major block as one coordinate for each dim."""
    found: list[Tensor] = []
    for n in reversed(shape):
        found.insert(0, at % n)
        at = at // n
    return found


def positions(coordinates: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """One coordinate for each dim, which may broadcast, as flat positions in a row-major block."""
    found, *rest = coordinates
    for c, n in zip(rest, shape[1:], strict=True):
        found = found * n + c
    return found


def move(at: Tensor, shape: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Flat positions in a block, made in place those in the whole, where it begins at `starts`.

    shape, sizes: of the block and the whole, each 1 at least.
    """
    inner = outer = 1
    first, gaps = 0, list[tuple[int, int]]()
    for n, start, size in reversed(list(zip(shape, starts, sizes, strict=True))):
        first += start * outer
        # a row of the next dim is so much longer in the whole
        gaps.append((inner * n, outer * size - outer * n))
        inner, outer = inner * n, outer * size
    gaps = [(n, more) for n, more in gaps[:-1] if more]
    parts = [at] if at.numel() <= _LARGE else at.chunk(_PARTS, max(range(at.ndim), key=at.size))
    for part in parts:
        rows = [part // n for n, _ in gaps]
        part += first
        for row, (_, more) in zip(rows, gaps, strict=True):
            part.add_(row, alpha=more)
    return at


def whole(at: Tensor, shape: Sequence[int], spec: Spec, first: int = 0) -> Tensor:
    """Flat positions in this rank's rows of dims `first` on, as positions in the whole of these.

    shape: that of the rows to which the positions belong; each size is 1 at least.
    """
    return move(at.clone(), shape, spec.offset[first:], spec.shape[first:]) if shape else at
