"""Point clouds cut into shards that are compact in space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ... import comm
from ...rules.rows import read
from ...shares import balanced
from ...spec import Dim, Spec, whole_dims
from ...tensor import ShardTensor, wrap
from .curves import even, hilbert_keys, kd_parts, morton_keys

_CURVES = {"hilbert": hilbert_keys, "morton": morton_keys}
# points that are numbered at a time
_PIECE = 2**18
# points from which on the ranks share out the work of a curve
SHARED = 2**16


@dataclass(frozen=True, eq=False)
class Partition:
    """Which point lies where.

    order: (N,) int64, the points shard by shard; inverse: (N,), where each point went;
    sizes: of the shards; axes: the mesh axes over which they lie.
    """

    mesh: DeviceMesh
    axes: tuple[int, ...]
    order: Tensor
    inverse: Tensor
    sizes: tuple[int, ...]

    def shard(self, x: Tensor) -> ShardTensor:
        """x (N, ...) in the order of the partition, sharded along dim 0; differentiable.

        Of a plain tensor each rank takes its own rows and nothing is sent; rows of a ShardTensor
        come from their owners.
        """
        spec = self._spec(x, self.sizes)
        index = self.order[self._own(spec)]
        if isinstance(x, ShardTensor):
            return read(x, wrap(index, spec.with_dims(spec.dims[:1])), negative=None)
        (x,) = comm.vary([x], comm.group(self.mesh, self.axes))
        return wrap(x[index], spec)

    def restore(self, x: Tensor) -> ShardTensor:
        """What `shard` made, or anything (N, ...) of its order, in the order of the points.

        Sharded along dim 0 into about equal shards; each rank fetches the rows that it gets.
        """
        spec = self._spec(x, even(len(self.order), len(self.sizes)))
        index = wrap(self.inverse[self._own(spec)], spec.with_dims(spec.dims[:1]))
        return read(x, index, negative=None)

    def _spec(self, x: Tensor, sizes: Sequence[int]) -> Spec:
        n = len(self.order)
        if not x.ndim or x.shape[0] != n:
            raise ValueError(f"a tensor of shape {tuple(x.shape)} for a partition of {n} points")
        first = Dim(n, self.axes, tuple(sizes))
        return Spec(self.mesh, (first, *whole_dims(x.shape[1:])))

    def _own(self, spec: Spec) -> slice:
        return slice(spec.offset[0], spec.offset[0] + spec.local_shape[0])


def partition(
    points: Tensor,
    mesh: DeviceMesh,
    order: str = "hilbert",
    weights: Tensor | None = None,
    axes: Sequence[int] | None = None,
    speeds: Sequence[float] | None = None,
) -> Partition:
    """A partition of plain points (N, D), the same on every rank, over mesh axes (default: all).

    order: "hilbert" or "morton" (pieces of a curve) or "kd" (boxes). weights: (N,) the work of each
    point, to be the same for all shards; without it shards have the same number of points. speeds:
    of the ranks, along a curve; a shard has work for its rank's (see `balance.sizes`). Along a
    curve every rank sorts its part of many points, O(N / ranks), and the order is gathered: all
    ranks of the axes must call. Few points, and boxes, are sorted on every rank alike. Raises
    ValueError for points that are sharded already, and for an unknown order.
    """
    if isinstance(points, ShardTensor) or isinstance(weights, ShardTensor):
        raise ValueError("partition: plain points and weights, whole on every rank: full_tensor()")
    if weights is not None and weights.shape != points.shape[:1]:
        raise ValueError(f"partition: weights {tuple(weights.shape)} of {len(points)} points")
    if axes is not None and not all(-mesh.ndim <= a < mesh.ndim for a in axes):
        raise ValueError(f"partition: axes {tuple(axes)} of a mesh of {mesh.ndim}")
    on = tuple(range(mesh.ndim)) if axes is None else tuple(sorted(a % mesh.ndim for a in axes))
    parts = prod(mesh.size(a) for a in on)
    if order == "kd" and speeds is not None:
        raise ValueError("partition: speeds of ranks need the order of a curve, not 'kd'")
    if order == "kd":
        found = kd_parts(points, parts, weights)
        by, sizes = torch.cat(found), [len(part) for part in found]
    elif order in _CURVES:
        by = _along(order, points, mesh, on)
        sizes = even(len(by), parts)
        if weights is not None or speeds is not None:
            work = None if weights is None else weights[by]
            sizes = [*balanced(len(by), parts, weights=work, speeds=speeds)]
    else:
        raise ValueError(f"partition: order {order!r}; expected 'hilbert', 'morton' or 'kd'")
    inverse = torch.empty_like(by)
    for a in range(0, len(by), _PIECE):
        b = min(a + _PIECE, len(by))
        inverse[by[a:b]] = torch.arange(a, b, device=by.device)
    return Partition(mesh, on, by, inverse, tuple(sizes))


def _along(curve: str, points: Tensor, mesh: DeviceMesh, axes: tuple[int, ...]) -> Tensor:
    """The order (N,) of points along a curve."""
    group, keys = comm.group(mesh, axes), _CURVES[curve]
    n = comm.size(group)
    if n == 1 or len(points) < SHARED or not comm.knows_values(group):
        return keys(points).argsort(stable=True)
    spec = Spec(mesh, (Dim(len(points), axes, tuple(even(len(points), n))),))
    first = spec.offset[0]
    mine = wrap(keys(points, slice(first, first + spec.local_shape[0])), spec)
    order = torch.argsort(mine, stable=True)
    assert isinstance(order, ShardTensor)
    return comm.gather(order._local, 0, spec.dims[0].sizes, group)
