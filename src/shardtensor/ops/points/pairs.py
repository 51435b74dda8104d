"""Rows asked about and rows that answer, brought to the ranks that work on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ... import comm
from ...comm.groups import ALONE
from ...comm.route import fetch, find
from ...errors import UnsupportedOpError
from ...rules.operands import cut_axes, dims_of, mesh_of
from ...rules.rows import covering
from ...spec import Dim, Spec, axes_in, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit

# integers of the same width, so that a row and its index travel in one message
_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


class Met(NamedTuple):
    """Local rows of two operands, and how they lie."""

    mesh: DeviceMesh | None
    asking: Tensor
    rows: Tensor
    out: Dim
    held: Dim
    group: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the shards of `rows`."""
        return self.held.sizes if self.held.axes else (self.held.size,)

    def made(self, local: Tensor) -> Tensor:
        """What was made for each asking row, as the caller sees it."""
        if self.mesh is None:
            return local
        return wrap(local, Spec(self.mesh, (self.out, *whole_dims(local.shape[1:]))))


def meet(asking: Tensor, rows: Tensor) -> Met:
    """Local rows of both, sharded along dim 0 only.

    `asking` stays where it is, or is spread too over the mesh axes that shard `rows`.
    """
    if not any(isinstance(x, ShardTensor) for x in (asking, rows)):
        return Met(None, asking, rows, Dim(len(asking)), Dim(len(rows)), ALONE)
    mesh = mesh_of(asking, rows)
    (out, *_), (held, *_) = dims_of(asking), dims_of(rows)
    (out,) = covering(mesh, (out,), cut_axes(held), ())
    a, b = fit(
        mesh,
        axes_in((out, held)),
        (asking, (out, *whole_dims(asking.shape[1:]))),
        (rows, (held, *whole_dims(rows.shape[1:]))),
    )
    return Met(mesh, a, b, out, held, comm.group(mesh, held.axes) if held.axes else ALONE)


def once(x: Tensor, index: Tensor, sizes: tuple[int, ...], group: str) -> Tensor:
    """Rows (E, ...) of x by global index (E,); each travels once, however often it is named."""
    return x[index] if len(sizes) == 1 else fetch(x, find(index, sizes, group))


def check(op: str, queries: Tensor, points: Tensor) -> None:
    """Raise ValueError unless both are coordinates of one space."""
    if queries.ndim != 2 or points.ndim != 2 or queries.shape[1] != points.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(points.shape)}"
        raise ValueError(f"{op}: coordinates of shapes {shapes}; expected (M, D) and (N, D)")
    if queries.dtype != points.dtype or not queries.is_floating_point():
        raise ValueError(
            f"{op}: coordinates of {queries.dtype} and {points.dtype}; expected one floating dtype"
        )


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which distances are taken: at least fp32."""
    return x if x.dtype in _INTEGERS else x.float()


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (m, n) of rows of a (m, D) and b (n, D).

    Coordinates are added in turn: the same bits on any layout, and nothing of D times the size.
    """
    total = a.new_zeros(len(a), len(b))
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
        step = x[:, None] - y
        total += step.mul_(step)
    return total


def pack(x: Tensor, index: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows of x (n, C) and for each its index on this rank, as integers (n, C + 1).

    sizes: of all ranks' rows. Raises UnsupportedOpError where an index does not fit.
    """
    integers = _INTEGERS[x.dtype]
    if max(sizes) > torch.iinfo(integers).max:
        raise UnsupportedOpError(
            f"{max(sizes)} points of {x.dtype} on one rank: take more ranks, or float64"
        )
    return torch.cat([x.contiguous().view(integers), index[:, None].to(integers)], 1)


def unpack(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `pack` was given."""
    return packed[:, :-1].contiguous().view(dtype), packed[:, -1].long()
