"""Points that are far from each other."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ... import comm
from ...spec import Dim, Spec
from ...tensor import wrap
from .pairs import check, meet, pack, squared, unpack, wide


@torch.no_grad()
def farthest_point_sampling(points: Tensor, m: int, start: int = 0) -> Tensor:
    """Indices (m,) int64 of points (N, D): `start`, then always the point farthest from all chosen.

    Of equally far points the one of lowest index. The same on every rank; plain of a plain tensor.
    Eldar et al., IEEE Trans. Image Process. 6(9), 1305 (1997). Each of the m steps works on a
    rank's own points and all-gathers D + 2 numbers. Raises ValueError for m > N and for a start
    that is no point.
    """
    check("farthest_point_sampling", points, points)
    n = len(points)
    if not 0 <= m <= n or not (0 <= start < n or m == 0):
        raise ValueError(f"farthest_point_sampling: {m} of {n} points from point {start}")
    met = meet(points, points)
    x, sizes, group = wide(met.rows), met.sizes, met.group
    starts = torch.tensor(sizes, device=x.device).cumsum(0) - torch.tensor(sizes, device=x.device)
    here = start - int(starts[comm.rank(group)])
    far = x.new_zeros(len(x))
    if 0 <= here < len(x):
        far[here] = 1
    chosen = []
    for step in range(m):
        # argmax is the first of equals
        best = far.argmax() if len(x) else starts[0]
        mine = (
            torch.cat([far[best, None], x[best]]) if len(x) else x.new_full((1 + x.shape[1],), -1)
        )
        found = comm.gather(pack(mine[None], best[None], sizes), 0, [1] * len(sizes), group)
        rows, index = unpack(found, x.dtype)
        top = rows[:, 0].argmax()
        chosen.append(index[top] + starts[top])
        if step == 0:
            far.fill_(inf)
        far = torch.minimum(far, squared(x, rows[top, None, 1:])[:, 0])
    result = torch.stack(chosen) if chosen else starts[:0]
    return result if met.mesh is None else wrap(result, Spec(met.mesh, (Dim(m),)))
