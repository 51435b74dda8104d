"""Space-filling curves and k-d trees: orders in which near points are near."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MOST = 63  # bits of a key


def morton_order(points: Tensor, bits: int = 21) -> Tensor:
    """The order (N,) of plain points (N, D) along Morton's Z curve (Morton 1966), int64.

    bits: of each coordinate, at most 63 / D; cells are cubes. Points of a cell keep their order.
    """
    return morton_keys(points, bits=bits).argsort(stable=True)


def morton_keys(points: Tensor, rows: slice = slice(None), bits: int = 21) -> Tensor:
    """Where some of plain points (N, D) lie along Morton's curve through all of them, int64."""
    return _key(_cells(points, rows, bits))


def hilbert_order(points: Tensor, bits: int = 21) -> Tensor:
    """The order (N,) of plain points (N, D) along Hilbert's curve, int64.

    Neighbours on the curve are neighbours in space, so its pieces have less surface than those of
    `morton_order`. bits: as there. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707,
    381 (2004).
    """
    return hilbert_keys(points, bits=bits).argsort(stable=True)


def hilbert_keys(points: Tensor, rows: slice = slice(None), bits: int = 21) -> Tensor:
    """Where some of plain points (N, D) lie along Hilbert's curve through all of them, int64."""
    cells = _cells(points, rows, bits)
    x = list(cells.coordinates.unbind(1))
    for bit in reversed(range(1, cells.bits)):
        low = (1 << bit) - 1
        for i in range(len(x)):
            on = (x[i] >> bit & 1).bool()
            swapped = torch.where(on, 0, (x[0] ^ x[i]) & low)
            x[0] = torch.where(on, x[0] ^ low, x[0] ^ swapped)
            # with i = 0 the two are one, and nothing is swapped
            x[i] = x[i] ^ swapped if i else x[0]
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    for bit in range(1, cells.bits):
        turn = turn ^ ((x[-1] >> bit & 1) * ((1 << bit) - 1))
    turned = torch.stack([c ^ turn for c in x], 1)
    return _key(_Cells(turned, cells.bits))


def kd_order(points: Tensor, parts: int) -> Tensor:
    """The order (N,) in which a balanced k-d tree lists plain points (N, D), int64.

    The first part is the first N // parts rows (one more in the first N % parts parts), and so on.
    Each box is split along its widest axis at the rank that halves its parts; `parts` need not be
    a power of two. Bentley, Comm. ACM 18(9), 509 (1975).
    """
    return torch.cat(kd_parts(points, parts))


def kd_parts(points: Tensor, parts: int, weights: Tensor | None = None) -> list[Tensor]:
    """The points of each part of a k-d tree, of equal count or about equal weight."""
    if points.ndim != 2 or parts < 1:
        raise ValueError(f"kd_order: points {tuple(points.shape)}, {parts} parts; expected (N, D)")
    points = points.detach()

    def split(index: Tensor, first: int, stop: int) -> list[Tensor]:
        n = stop - first
        if n == 1:
            return [index]
        here = points[index]
        if len(index):
            axis = int((here.amax(0) - here.amin(0)).argmax())
            index = index[here[:, axis].argsort(stable=True)]
        left = n // 2
        if weights is None:
            at = sum(even(len(points), parts)[first : first + left])
        else:
            at = cut(weights[index], [left / n])[0]
        return [*split(index[:at], first, first + left), *split(index[at:], first + left, stop)]

    return split(torch.arange(len(points), device=points.device), 0, parts)


def even(n: int, parts: int) -> list[int]:
    """Sizes of parts that differ by at most one."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def cut(weights: Tensor, fractions: list[float]) -> list[int]:
    """How many of the first points have each fraction of the weight, to the nearest point."""
    ends = weights.detach().double().cumsum(0)
    if not len(ends):
        return [0] * len(fractions)
    targets = ends.new_tensor(fractions) * ends[-1]
    return torch.searchsorted(ends - weights / 2, targets).tolist()


class _Cells(NamedTuple):
    """Cells (N, D) of a grid of 2**bits cubes along the widest axis."""

    coordinates: Tensor
    bits: int


def _cells(points: Tensor, rows: slice, bits: int) -> _Cells:
    """The cells of some of the points, of a grid around all."""
    if points.ndim != 2 or not points.shape[1] or bits < 0:
        raise ValueError(f"order of points {tuple(points.shape)} by {bits} bits; expected (N, D)")
    bits = min(bits, _MOST // points.shape[1], 52)
    points = points.detach()
    x = points[rows].double()
    if not len(points):
        return _Cells(x.long(), bits)
    low, high = points.amin(0).double(), points.amax(0).double()
    width = (high - low).amax().clamp(min=torch.finfo(x.dtype).tiny)
    return _Cells(((x - low) / width * 2**bits).long().clamp(max=2**bits - 1), bits)


def _key(cells: _Cells) -> Tensor:
    """The bits of the coordinates in turn, the first coordinate's first."""
    columns = cells.coordinates.unbind(1)
    key = torch.zeros_like(columns[0])
    for bit in reversed(range(cells.bits)):
        for x in columns:
            key = key << 1 | (x >> bit & 1)
    return key
