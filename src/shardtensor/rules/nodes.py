"""Which rows are nodes: those that were read by index, and how tensors with a row for each lie."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch.distributed.device_mesh import DeviceMesh

from .. import cache
from ..spec import Dim, Spec
from ..tensor.recut import WHOLE


class _Indexed:
    """The dims whose rows were read by index, by mesh and size: nodes, most often."""

    def __init__(self) -> None:
        self.dims: dict[tuple[DeviceMesh, int], Dim] = {}

    def cache_clear(self) -> None:
        self.dims.clear()


indexed = _Indexed()
cache.register(indexed)


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
    rows = indexed.dims.get((spec.mesh, n))
    if rows is None and prod(map(int, shape)) >= WHOLE and n >= len(cut.sizes):
        rows = Dim.chunked(n, cut.axes, spec.mesh)
    if rows is None or rows.axes != cut.axes:
        return None
    return spec.with_dims([rows if d == other[0] else dim for d, dim in enumerate(spec.dims)])
