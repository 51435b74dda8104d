"""Neighbours in point clouds: the k nearest, and all within a radius.

Queries and points may be plain or ShardTensors, sharded along dim 0 into shards of any sizes, over
the same mesh axes or others. Results are sharded like the queries, and along the axes that shard
the points too; of plain tensors they are plain. Indices are global. Distances are Euclidean, taken
in fp32 at least, and differentiable in queries and points through the neighbours found; at
distance 0 the gradient is 0.

Cost: the boxes of all chunks (2 D numbers for `chunk` points) and n numbers go to all n ranks.
Then, in at most n - 1 rounds of two messages, come the chunks of other ranks' points that are
within reach of a query, D + 1 numbers a point, once. Of a cloud in the order of `partition` that is
what lies beside a rank's own part, of one in no order up to all of it; yet no rank ever holds more
than its own points and what it takes from one other. Work: the pairs of a query and a chunk within
its reach. Where gradients are wanted, each rank fetches the neighbours that are not its own, each
once, and sends their gradients back.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ... import _torch
from .nearest import NONE, Found, nearest
from .pairs import Met, check, meet, once, wide

_CHUNK = 512


def knn(queries: Tensor, points: Tensor, k: int, *, chunk: int = _CHUNK) -> tuple[Tensor, Tensor]:
    """Distances and indices (M, k) of the k nearest points (N, D) of each query (M, D).

    The nearest first; of points whose squared distances are the same number that of lower index.
    chunk: points and queries that are compared at a time. Raises ValueError for k > N.
    """
    check("knn", queries, points)
    if not 0 < k <= len(points):
        raise ValueError(f"knn: {k} neighbours of {len(points)} points")
    met = meet(queries, points)
    found = nearest(met, k, None, chunk)
    return met.made(_distances(met, found)), met.made(found.index)


def radius(
    queries: Tensor, points: Tensor, r: float, max_neighbors: int, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest points within r: distances and indices (M, max_neighbors), and counts (M,).

    Within means: the squared distance is at most r * r, as numbers of the dtype of the points. The
    nearest first, ties as in `knn`; where there are fewer the distance is inf and the index -1.
    counts: all points within r, which may be more than max_neighbors.
    """
    return _within("radius", queries, points, r, max_neighbors, chunk, False)


def ball_query(
    queries: Tensor, points: Tensor, r: float, max_neighbors: int, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """As `radius`, but the points of lowest index within r, in the order of their indices.

    This is the grouping of PointNet++ (Qi et al. 2017, section 3.2), whose code fills up with the
    first index instead: torch.where(indices < 0, indices[:, :1], indices).
    """
    return _within("ball_query", queries, points, r, max_neighbors, chunk, True)


def _within(
    op: str, queries: Tensor, points: Tensor, r: float, most: int, chunk: int, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check(op, queries, points)
    if not 0 <= r < inf or most < 1:
        raise ValueError(f"{op}: radius {r} and at most {most} neighbours")
    met = meet(queries, points)
    found = nearest(met, most, r * r, chunk, first)
    index = found.index.masked_fill(found.index == NONE, -1)
    return met.made(_distances(met, found)), met.made(index), met.made(found.counts)


def _distances(met: Met, found: Found) -> Tensor:
    """Distances of what was found, with their gradients where they are wanted."""
    queries, points = met.asking, met.rows
    if not torch.is_grad_enabled() or not any(map(_torch.differentiated, (queries, points))):
        return found.d2.sqrt().to(queries.dtype)
    row, column = (found.index != NONE).nonzero(as_tuple=True)
    rows = once(wide(points), found.index[row, column], met.sizes, met.group)
    d2 = sum(
        (x - y) ** 2 for x, y in zip(wide(queries)[row].unbind(1), rows.unbind(1), strict=True)
    )
    assert isinstance(d2, Tensor)
    apart = d2 > 0
    d = torch.where(apart, torch.where(apart, d2, 1).sqrt(), 0)
    return found.d2.index_put((row, column), d.to(found.d2.dtype)).to(queries.dtype)
