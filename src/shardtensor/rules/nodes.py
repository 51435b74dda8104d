"""Which rows are nodes: those that were read by index, and how tensors with a row for each lie."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import cache, settings
from ..spec import Dim, Spec, whole_dims
from ..tensor import ShardTensor
from ..tensor.recut import WHOLE


class _Indexed:
    """The dims whose rows were read by index, by mesh and size: nodes, most often."""

    def __init__(self) -> None:
        self.dims: dict[tuple[DeviceMesh, int], Dim] = {}

    def cache_clear(self) -> None:
        self.dims.clear()


_indexed = _Indexed()
cache.register(_indexed)


def _known() -> dict[tuple[DeviceMesh, int], Dim]:
    return settings.current("indexed", _indexed.dims)


settings.remembered["indexed"] = _known


def note(mesh: DeviceMesh, rows: Dim) -> None:
    """Remember how rows lie that are read by index."""
    for known in (_indexed.dims, _known()):
        known[mesh, rows.size] = rows


def lies(spec: Spec, shape: Sequence[int]) -> Spec | None:
    """How a tensor lies that differs from one in spec in one dim, which is cut: the rows of nodes.

    As rows of that number that were read by index; others are cut where the tensor is large. None:
    nothing tells.
    """
    if len(shape) != len(spec.dims):
        return None
    other = [d for d, n in enumerate(spec.shape) if n != shape[d]]
    if len(other) != 1 or not spec.dims[other[0]].axes:
        return None
    cut, n = spec.dims[other[0]], int(shape[other[0]])
    rows = _known().get((spec.mesh, n))
    if rows is None and prod(map(int, shape)) >= WHOLE and n >= len(cut.sizes):
        rows = Dim.chunked(n, cut.axes, spec.mesh)
    if rows is None or rows.axes != cut.axes:
        return None
    return spec.with_dims([rows if d == other[0] else dim for d, dim in enumerate(spec.dims)])


def rows_written(shape: Sequence[int], entries: Sequence[Any], value: Any) -> Spec | None:
    """How the x of `x[entries] = value` lies, whose rows are written at a vector of numbers.

    As a sharded value or vector tells, see `lies`; None: nothing tells.
    """
    found = [d for d, e in enumerate(entries) if isinstance(e, Tensor)]
    rest = (e for e in entries if not isinstance(e, Tensor))
    if len(found) != 1 or not all(isinstance(e, slice) and e == slice(None) for e in rest):
        return None
    (d,) = found
    index = entries[d]
    if index.ndim != 1 or index.dtype is torch.bool:
        return None
    if isinstance(value, ShardTensor) and value.ndim == len(shape):
        return None if value._spec.partial else lies(value._spec, shape)
    if not isinstance(index, ShardTensor) or index._spec.partial:
        return None
    whole = whole_dims(shape)
    dims = (*whole[:d], index._spec.dims[0], *whole[d + 1 :])
    return lies(Spec(index._spec.mesh, dims), shape)
