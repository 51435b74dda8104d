"""Signed distances to a triangle mesh."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ... import comm
from ...comm.groups import ALONE
from ...errors import UnsupportedOpError
from ...rules.operands import cut_axes, dims_of, mesh_of
from ...rules.rows import covering, normal
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit
from .pairs import check
from .triangle import closest, dot, turns

_CHUNK = 256


def signed_distance(
    queries: Tensor, vertices: Tensor, faces: Tensor, *, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """Distances (M,) of queries (M, 3) to a mesh, negative inside, and its closest points (M, 3).

    vertices (V, 3) plain; faces (F, 3) int64, whose normals point outwards, plain or sharded along
    dim 0. Inside is where the generalised winding number exceeds 1/2 (Jacobson et al., ACM Trans.
    Graph. 32(4), 33 (2013)), so meshes may have holes and overlaps. Of faces equally near the first
    counts. Differentiable in queries and vertices, through the closest point; 0 at distance 0.

    Sharded like the queries. Faces sharded over the same mesh axes travel around the ring (3
    integers a face, n - 1 messages), and the queries are spread over all axes of the faces; over
    other axes only results are reduced, 6 numbers a query. Every rank compares its queries with all
    faces, chunk * chunk at a time. Raises ValueError without faces, IndexError for a face that
    names no vertex, UnsupportedOpError for sharded vertices.
    """
    check("signed_distance", queries, vertices)
    if queries.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3 or not len(faces):
        raise ValueError(
            f"signed_distance: queries {tuple(queries.shape)}, faces {tuple(faces.shape)}; "
            "expected (M, 3) and (F, 3), at least one face"
        )
    if isinstance(vertices, ShardTensor) and vertices._spec.placements != (
        vertices._spec.replicated().placements
    ):
        raise UnsupportedOpError(
            f"signed_distance: vertices {vertices._spec}: take vertices.full_tensor() first"
        )
    if not any(isinstance(x, ShardTensor) for x in (queries, vertices, faces)):
        return _distance(queries, vertices, faces.long(), (len(faces),), ALONE, False, chunk)
    mesh = mesh_of(queries, vertices, faces)
    (out, *_), (held, *_) = dims_of(queries), dims_of(faces)
    need = cut_axes(held)
    ring = bool(set(need) & set(out.axes))
    if ring:
        (out,) = covering(mesh, (out,), need, ())
    three = Dim(3)
    q, v = fit(mesh, out.axes, (queries, (out, three)), (vertices, None))
    (f,) = fit(mesh, (), (faces, (held, three)))
    f = normal(f, Spec(mesh, (held, three)), len(vertices), False, "signed_distance")
    sizes = held.sizes if held.axes else (held.size,)
    group = comm.group(mesh, held.axes) if held.axes else ALONE
    d, at = _distance(q, v, f, sizes, group, ring, chunk)
    return wrap(d, Spec(mesh, (out,))), wrap(at, Spec(mesh, (out, three)))


def _distance(
    q: Tensor,
    vertices: Tensor,
    faces: Tensor,
    sizes: tuple[int, ...],
    group: str,
    ring: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    corners, winding = _search(q.detach(), vertices.detach(), faces, sizes, group, ring, chunk)
    at = closest(q, *(vertices[i] for i in corners.unbind(1)))
    d2 = dot(q - at, q - at)
    apart = d2 > 0
    d = torch.where(apart, torch.where(apart, d2, 1).sqrt(), 0)
    return torch.where(winding > 0.5, -d, d), at


@torch.no_grad()
def _search(
    q: Tensor,
    vertices: Tensor,
    faces: Tensor,
    sizes: tuple[int, ...],
    group: str,
    ring: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The corners (m, 3) of the nearest face of each query, and winding numbers (m,)."""
    n, me = len(sizes), comm.rank(group)
    best = q.new_full((len(q),), inf)
    which = faces.new_full((len(q),), sum(sizes))
    corners, winding = faces.new_zeros(len(q), 3), torch.zeros_like(best)
    for step in range(n if ring else 1):
        if step:
            faces = comm.ring(faces, 0, sizes, group, held=step - 1)
        start = sum(sizes[: (me - step) % n])
        for a in range(0, len(q), chunk):
            rows = slice(a, a + chunk)
            p = q[rows, None]
            for b in range(0, len(faces), chunk):
                part = faces[b : b + chunk]
                triangle = [vertices[i] for i in part.unbind(1)]
                to = p - closest(p, *triangle)
                d2, face = dot(to, to).min(1)
                winding[rows] += turns(p, *triangle).sum(1)
                number = face + start + b
                # of equals the first, in whatever order blocks come
                better = (d2 < best[rows]) | ((d2 == best[rows]) & (number < which[rows]))
                best[rows] = torch.where(better, d2, best[rows])
                which[rows] = torch.where(better, number, which[rows])
                corners[rows] = torch.where(better[:, None], part[face], corners[rows])
    if n > 1 and not ring:
        nearest = comm.reduce(best, group, "min")
        first = comm.reduce(torch.where(best == nearest, which, sum(sizes)), group, "min")
        corners = comm.reduce(torch.where((which == first)[:, None], corners, 0), group)
        winding = comm.reduce(winding, group)
    return corners, winding
