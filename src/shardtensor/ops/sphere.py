"""Boundary conditions of latitude-longitude grids: around the globe and across the poles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rules.images.pad import padded
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced, to_dims


def pad_sphere(
    x: Tensor,
    pad: Sequence[int],
    *,
    sign: float | Tensor = 1,
    poles: bool = False,
    dims: tuple[int, int] = (-2, -1),
) -> Tensor:
    """x with `pad` = (north, south, west, east) more rows and columns of the sphere around it.

    dims: latitude (first row at one pole, last at the other) and longitude (periodic). What lies
    across a pole is the same hemisphere on the other side: its rows reversed and turned by half the
    longitudes, times `sign`, which is -1 for the components of a vector along latitude and
    longitude (or a tensor that broadcasts, one sign for each channel). poles: whether the first
    and last rows are the poles themselves, which then are not repeated.

    x may be plain or a ShardTensor sharded in either dim or both. Only rows and columns of the pad
    are sent; they stay with the shard that they lie beside. Raises ValueError for an odd number of
    longitudes with rows across a pole, and for more rows or columns than there are.
    """
    north, south, west, east = (int(n) for n in pad)
    if not all(-x.ndim <= d < x.ndim for d in dims):
        raise ValueError(f"pad_sphere: dims {dims} of a tensor of {x.ndim} dims")
    lat, lon = (d % x.ndim for d in dims)
    rows, columns = x.shape[lat], x.shape[lon]
    if min(north, south, west, east) < 0 or lat == lon:
        raise ValueError(f"pad_sphere: {tuple(pad)} in dims {dims}: two dims, nothing negative")
    if max(north, south) > rows - poles or max(west, east) > columns:
        raise ValueError(f"pad_sphere: {tuple(pad)} of {rows} latitudes, {columns} longitudes")
    if (north or south) and columns % 2:
        raise ValueError(f"pad_sphere: {columns} longitudes: the other side needs an even number")
    x = reduced(x)
    first = x.narrow(lat, int(poles), north)
    last = x.narrow(lat, rows - poles - south, south)
    beyond = [_other_side(part, lat, lon, sign) for part in (first, last)]
    x = _with_rows(beyond[0], x, beyond[1], lat) if north or south else x
    return _around(x, lon, west, east) if west or east else x


def _other_side(part: Tensor, lat: int, lon: int, sign: float | Tensor) -> Tensor:
    """Rows beside a pole as they look from across it."""
    if not part.shape[lat]:
        return part
    turned = part.flip(lat).roll(part.shape[lon] // 2, lon)
    return turned if isinstance(sign, int | float) and sign == 1 else turned * sign


def _with_rows(first: Tensor, x: Tensor, last: Tensor, lat: int) -> Tensor:
    """first, x, last one after the other; the shards of x stay where they are."""
    if not isinstance(x, ShardTensor):
        return torch.cat([first, x, last], lat)
    assert isinstance(first, ShardTensor) and isinstance(last, ShardTensor)
    dim = x._spec.dims[lat]
    full = [i for i, n in enumerate(dim.sizes) if n] or [0]
    parts = []
    for part, at in ((first, full[0]), (last, full[-1])):
        n = part.shape[lat]
        here = Dim(n, dim.axes, tuple(n if i == at else 0 for i in range(len(dim.sizes))))
        dims = x._spec.replace({lat: here}).dims
        parts.append(to_dims(part, dims))
    cuts = (p._spec.dims[lat].sizes for p in (parts[0], x, parts[1]))
    sizes = tuple(sum(shards) for shards in zip(*cuts, strict=True))
    new = Dim(x.shape[lat] + first.shape[lat] + last.shape[lat], dim.axes, sizes)
    local = torch.cat([parts[0]._local, x._local, parts[1]._local], lat)
    spec = x._spec.replace({lat: new})
    return wrap(local, spec)


def _around(x: Tensor, lon: int, west: int, east: int) -> Tensor:
    """Columns of the other end on both sides."""
    if isinstance(x, ShardTensor) and x._spec.dims[lon].is_cut:
        # where shards meet, the rule for padding takes any number of dims
        return padded(x, (0, 0) * (x.ndim - 1 - lon) + (west, east), "circular")
    n = x.shape[lon]
    return torch.cat([x.narrow(lon, n - west, west), x, x.narrow(lon, 0, east)], lon)
