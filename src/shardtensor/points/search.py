"""Neighbours across shards: each rank's candidates, of whatever rank, without gathering all points.

Queries (M, D) and points (N, D) are plain tensors, the same on all ranks, or sharded along dim 0 in
any way. Where they share a mesh axis, ranks first tell each other the box around their queries and
how far these may have to look; then each sends every other the points within its reach, block by
block. Well partitioned points (`partition`) make that few; in the worst case each point travels to
every rank, one block at a time in memory. Where ranks have the same queries and different points,
each finds its own best, and these are merged.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..comm import wire
from ..errors import UnsupportedOpError
from ..redistribute import like, reduced
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from .nearest import NONE, Best


def knn(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest points of each query, nearest first, of equal ones the lower index.

    queries (M, D), points (N, D), floating point. Returns distances (M, k) and global indices
    (M, k), int64, sharded as the queries are. Distances have gradients to both; that of a distance
    of zero is zero. Raises ValueError where k is not in 1..N.

    Cost, in points: what lies within reach of each rank's queries, D numbers and an index each; 3 +
    rounds small messages. Memory: one block of points beside k candidates for each query.
    """
    _check(queries, points)
    if not 1 <= k <= len(points):
        raise ValueError(f"k is {k}, of {len(points)} points")
    best, spec = _search(queries, points, k, None, False)
    return _result(queries, points, best, spec)[:2]


def radius(
    queries: Tensor, points: Tensor, r: float, max_neighbors: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest max_neighbors points within r (inclusive) of each query, nearest first.

    Returns distances (M, max_neighbors), inf where there are fewer, their global indices, -1 there,
    and how many points there are within r (M,), which may be more. Gradients and cost as of `knn`.
    """
    return _within(queries, points, r, max_neighbors, False)


def ball_query(
    queries: Tensor, points: Tensor, r: float, max_neighbors: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `radius`, but of the points within r those of the lowest indices, in their order.

    The grouping of PointNet++ (Qi et al. 2017, 3.3), which fills up with the first index where this
    has -1.
    """
    return _within(queries, points, r, max_neighbors, True)


def _within(queries: Tensor, points: Tensor, r: float, most: int, by_index: bool) -> Any:
    _check(queries, points)
    if r < 0 or most < 1:
        raise ValueError(f"r is {r} and max_neighbors {most}; expected r >= 0, max_neighbors >= 1")
    best, spec = _search(queries, points, most, r * r, by_index)
    return _result(queries, points, best, spec)


def _check(queries: Tensor, points: Tensor) -> None:
    if queries.ndim != 2 or points.ndim != 2 or queries.shape[1] != points.shape[1]:
        raise ValueError(
            f"queries (M, D) and points (N, D), not {tuple(queries.shape)}, {tuple(points.shape)}"
        )
    if queries.dtype != points.dtype or not queries.is_floating_point():
        raise ValueError(f"queries of {queries.dtype} and points of {points.dtype}")


def rows_of(x: Tensor) -> tuple[Tensor, Dim]:
    """(this rank's rows, where all lie); the columns whole."""
    if not isinstance(x, ShardTensor):
        return x.detach(), Dim(len(x))
    x = reduced(x.detach())
    rows = x._spec.dims[0]
    whole = [Dim(n) for n in x.shape[1:]]
    return like(x, Spec(x._spec.mesh, (rows, *whole)))._local, rows


@torch.no_grad()
def _search(
    queries: Tensor, points: Tensor, k: int, limit: float | None, by_index: bool
) -> tuple[Best, Spec | None]:
    """The best candidates of this rank's queries, and how queries lie; None: all plain."""
    (q, q_rows), (p, p_rows) = rows_of(queries), rows_of(points)
    best = Best.empty(q, k, limit, by_index)
    meshes = {x._spec.mesh for x in (queries, points) if isinstance(x, ShardTensor)}
    if len(meshes) > 1:
        raise UnsupportedOpError("queries and points on different meshes; distribute both on one")
    if not meshes:
        best.add(q, p, torch.arange(len(p), device=p.device))
        return best, None
    (mesh,) = meshes
    group = comm.group(mesh, p_rows.axes)
    start = p_rows.offsets[comm.rank(group)] if p_rows.axes else 0
    index = torch.arange(start, start + len(p), device=p.device)
    best.add(q, p, index)
    if comm.size(group) > 1:
        if set(p_rows.axes) & set(q_rows.axes):
            _from_others(best, q, p, index, group)
        else:
            _merged(best, group)
    return best, Spec(mesh, (q_rows,))


def _merged(best: Best, group: str) -> None:
    """Each rank's best for the same queries, from different points."""
    n, me = comm.size(group), comm.rank(group)
    found = [wire.all_gather(x, [x.shape] * n, group) for x in (best.d2, best.index, best.inside)]
    for r, (d2, index, inside) in enumerate(zip(*found, strict=True)):
        if r != me:
            best.merge(Best(d2, index, inside, best.limit, best.by_index))


def _from_others(best: Best, q: Tensor, p: Tensor, index: Tensor, group: str) -> None:
    """What other ranks' points add."""
    n, me = comm.size(group), comm.rank(group)
    boxes = wire.all_gather(_reach(best, q), [[2, q.shape[1]]] * n, group)
    mine = [(p >= low).logical_and_(p <= high).all(1) for low, high in boxes]
    counts = torch.stack([m.sum() for m in mine])
    # moves[j][i]: how many points j sends to i
    moves = torch.stack(wire.all_gather(counts, [[n]] * n, group)).tolist()
    width = p.shape[1] * p.element_size() + index.element_size()
    for t in range(1, n):
        to, of = (me + t) % n, (me - t) % n
        if not any(moves[j][(j + t) % n] for j in range(n)):
            continue
        sends: list[list[Tensor]] = [[] for _ in range(n)]
        shapes: list[list[list[int]]] = [[] for _ in range(n)]
        sends[to] = [_packed(p[mine[to]], index[mine[to]])]
        shapes[of] = [[moves[of][me], width]]
        (block,) = wire.exchange(sends, shapes, sends[to][0], group, "points")[of]
        best.add(q, *_unpacked(block, p))


def _reach(best: Best, q: Tensor) -> Tensor:
    """(2, D): the corners of a box around all that this rank's queries may find."""
    if not len(q):
        return torch.stack(
            (q.new_full(q.shape[1:], torch.inf), q.new_full(q.shape[1:], -torch.inf))
        )
    far = sqrt(best.limit) if best.limit is not None else best.d2[:, -1].max().sqrt().item()
    # a little more, for what rounding may take
    far *= 1 + 8 * torch.finfo(q.dtype).eps
    low, high = q.amin(0), q.amax(0)
    slack = 8 * torch.finfo(q.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.stack((low - far - slack, high + far + slack))


def _packed(p: Tensor, index: Tensor) -> Tensor:
    """Coordinates and indices as rows of bytes: one message."""
    return torch.cat((p.contiguous().view(torch.uint8), index[:, None].view(torch.uint8)), 1)


def _unpacked(block: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    n = like.shape[1] * like.element_size()
    p = block[:, :n].clone(memory_format=torch.contiguous_format).view(like.dtype)
    return p, block[:, n:].clone(memory_format=torch.contiguous_format).view(torch.int64)[:, 0]


def _result(queries: Tensor, points: Tensor, best: Best, spec: Spec | None) -> Any:
    distances: Tensor = best.d2.sqrt()
    index, inside = best.index, best.inside
    if spec is not None:
        both = spec.with_dims([*spec.dims, Dim(index.shape[1])])
        distances, index = wrap(distances, both), wrap(index, both)
        inside = wrap(inside, spec)
    if torch.is_grad_enabled() and (queries.requires_grad or points.requires_grad):
        distances = _differentiable(queries, points, index)
    return distances, index, inside


def _differentiable(queries: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """The distances again, from the rows that were found."""
    away = queries.unsqueeze(1) - points[index.clamp(min=0)]
    total = away[..., 0].square()
    for d in range(1, queries.shape[1]):
        total = total + away[..., d].square()
    # the square root has no finite derivative at zero
    zero = total.detach() == 0
    found = total.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return found.masked_fill(index == NONE, torch.inf)
