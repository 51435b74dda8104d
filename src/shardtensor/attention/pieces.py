"""A tensor in pieces along its dims, of which boxes are read and written without joining it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

# of each dim but the last two
At = tuple[slice, ...]


class Pieces:
    """Tensors, or such in pieces along other dims, one after the other along dim d."""

    def __init__(self, d: int, parts: Sequence[Tensor | Pieces]) -> None:
        self.d, self.parts = d, parts
        self.shape: torch.Size
        self.edges = [0, *accumulate(p.shape[d] for p in parts)]
        shape = list(parts[0].shape)
        shape[d] = self.edges[-1]
        self.shape = torch.Size(shape)

    def within(self, rows: slice) -> Iterator[tuple[Tensor | Pieces, slice, slice]]:
        """(piece, rows of it, rows of the box) of all pieces that have some of the rows."""
        start, stop, step = rows.indices(self.edges[-1])
        for part, low, high in zip(self.parts, self.edges, self.edges[1:], strict=False):
            first = start + max(0, -(-(low - start) // step)) * step
            end = min(stop, high)
            if first < end:
                at = (first - start) // step
                n = len(range(first, end, step))
                yield part, slice(first - low, end - low, step), slice(at, at + n)


Pieced = Tensor | Pieces


def boxes(x: Pieced, at: At) -> Iterator[tuple[Tensor, At]]:
    """(view, where it lies in the box) of all that lies there."""
    if isinstance(x, Tensor):
        yield x[at], (slice(None),) * len(at)
        return
    for part, rows, where in x.within(at[x.d]):
        for view, inner in boxes(part, (*at[: x.d], rows, *at[x.d + 1 :])):
            yield view, (*inner[: x.d], where, *inner[x.d + 1 :])


def taken(x: Pieced, at: At) -> Tensor:
    """What lies there; a view where it is of one piece."""
    if isinstance(x, Tensor):
        return x[at]
    found = [taken(part, (*at[: x.d], rows, *at[x.d + 1 :])) for part, rows, _ in x.within(at[x.d])]
    return found[0] if len(found) == 1 else torch.cat(found, x.d)


def narrowed(x: Pieced, d: int, start: int, length: int) -> Pieced:
    """Rows of a dim along which x is in one piece."""
    if isinstance(x, Tensor):
        return x.narrow(d, start, length)
    return Pieces(x.d, [narrowed(p, d, start, length) for p in x.parts])


def rows_of(x: Pieced, d: int, start: int, stop: int) -> At:
    """The box of some rows of a dim."""
    return tuple(slice(start, stop) if i == d else slice(None) for i in range(len(x.shape) - 2))


def box_shape(x: Pieced, at: At) -> list[int]:
    """The shape of what lies there."""
    spans = [len(range(*s.indices(n))) for s, n in zip(at, x.shape, strict=False)]
    return [*spans, *x.shape[len(at) :]]
