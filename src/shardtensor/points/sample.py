"""Farthest point sampling over all shards."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import comm
from ..comm import wire
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from .nearest import squared_distances
from .search import rows_of


@torch.no_grad()
def farthest_point_sampling(points: Tensor, m: int, start: int = 0) -> Tensor:
    """Indices (m,) of points, each the farthest from those before it (Eldar et al. 1997).

    points (N, D), plain or sharded along dim 0. start: the first index. Of equally far points the
    lowest index. Returns int64, the same on all ranks. Raises ValueError where m is not in 1..N or
    start not in 0..N - 1.

    Cost: m - 1 rounds of one small all-gather (D + 2 numbers of each rank) and one pass over this
    rank's points. Memory: one number for each of them.
    """
    if points.ndim != 2 or not 1 <= m <= len(points) or not 0 <= start < len(points):
        raise ValueError(f"{m} of points {tuple(points.shape)} from {start}: m in 1..N, start in N")
    local, rows = rows_of(points)
    group = comm.group(points._spec.mesh, rows.axes) if isinstance(points, ShardTensor) else ""
    sharded = isinstance(points, ShardTensor) and comm.size(group) > 1
    first = rows.offsets[comm.rank(group)] if sharded else 0
    numbers = torch.arange(first, first + len(local), device=local.device)
    # the one to begin with is the farthest
    near = torch.where(numbers == start, torch.inf, 0).to(local.dtype)
    index, at = _farthest(local, near, first, group if sharded else None)
    near, chosen = torch.full_like(near, torch.inf), [index]
    for _ in range(m - 1):
        near = torch.minimum(near, squared_distances(local, at[None])[:, 0])
        index, at = _farthest(local, near, first, group if sharded else None)
        chosen.append(index)
    found = torch.tensor(chosen, device=local.device)
    if not isinstance(points, ShardTensor):
        return found
    return wrap(found, points._spec.with_dims([Dim(m)]))


def _farthest(local: Tensor, near: Tensor, first: int, group: str | None) -> tuple[int, Tensor]:
    """(global index, coordinates) of the first largest entry of near on any rank."""
    mine = local.new_full((2 + local.shape[1],), -1, dtype=torch.float64)
    if len(local):
        i = int((near == near.max()).nonzero()[0])
        mine[0], mine[1], mine[2:] = near[i], first + i, local[i]
    every = mine[None] if group is None else torch.stack(
        wire.all_gather(mine, [mine.shape] * comm.size(group), group)
    )  # fmt: skip
    # ranks hold ascending indices
    best = every[int((every[:, 0] == every[:, 0].max()).nonzero()[0])]
    return int(best[1]), best[2:].to(local.dtype)
