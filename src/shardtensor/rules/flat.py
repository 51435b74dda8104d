"""Flat positions: of one rank's tensor as of the whole one, and as coordinates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..spec import Spec


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


def whole(at: Tensor, shape: Sequence[int], spec: Spec, first: int = 0) -> Tensor:
    """Flat positions in this rank's rows of dims `first` on, as positions in the whole of these.

    shape: that of the rows to which the positions belong; each size is 1 at least.
    """
    if not shape:
        return at
    own = zip(coordinates(at, shape), spec.offset[first:], strict=True)
    return positions([c + start for c, start in own], spec.shape[first:])
