"""physicsnemo's searches by radius, whose kernels are Warp's, on sharded points and queries.

Each rank runs the stock kernel on its own queries and the points within their reach. That visits
the cells of a grid in an order that coordinates decide, and the points of a cell in the order of
their indices, so that a rank finds what one device finds, and in its order. The rules take effect
when the program imports physicsnemo; nothing here does.
"""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from .. import _torch, comm
from ..dispatch.fallback import fall_back
from ..dispatch.rule import rule
from ..rules.empty import with_one
from ..rules.labels import run
from ..rules.operands import cut_axes, dims_of, mesh_of
from ..spec import Dim, Spec, axes_in, whole_dims
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced, to_dims
from .points.pairs import meet
from .points.reach import near

_SEARCH = "physicsnemo.nn.functional.neighbors.radius_search._warp_impl"


@rule(f"{_SEARCH}.radius_search_impl")
def radius_search(
    points: Tensor,
    queries: Tensor,
    radius: float,
    max_points: int | None = None,
    return_dists: bool = False,
    return_points: bool = False,
) -> tuple[Tensor, ...]:
    """Indices, points, distances and counts, sharded as the queries are.

    Without max_points as many as there are: entries of one sample after those of another. Inside
    of a compiled program, whose graph knows no values, all points are gathered.
    """
    _check(points, queries)
    if _torch.is_tracing() and max_points is not None:
        # which points are near is not known in a graph, which has them all
        every = points, queries, radius, max_points, return_dists, return_points
        return fall_back(_op(), every, {})
    flags = return_dists, return_points
    alone = points.ndim == 2
    points, queries = (x.unsqueeze(0) if alone else x for x in (points, queries))
    if max_points is None:
        found = _all(points, queries, radius, *flags)
        index = found[0]
        return (index[1:] if alone else index, *found[1:])
    found = _some(points, queries, radius, max_points, *flags)
    # what was not asked for has no elements, nor a dim of samples
    kept = (True, return_points, return_dists, True)
    return tuple(x[0] if alone and k else x for x, k in zip(found, kept, strict=True))


def _check(points: Tensor, queries: Tensor) -> None:
    if points.ndim != queries.ndim or points.ndim not in (2, 3):
        raise ValueError(
            "points and queries must be 2D (N, 3) or 3D (B, N, 3), "
            f"got {points.ndim}D and {queries.ndim}D"
        )
    if points.ndim == 3 and len(points) != len(queries):
        raise ValueError(
            f"Batch dimensions must match: points has {len(points)}, queries has {len(queries)}"
        )
    if points.shape[-1] != 3 or queries.shape[-1] != 3:
        raise ValueError(f"points {tuple(points.shape)} and queries {tuple(queries.shape)}: not 3D")


def _op() -> Any:
    return torch.ops.physicsnemo.radius_search_warp.default


def _stock(points: Tensor, queries: Tensor, of: tuple[int, int], *args: Any) -> tuple[Tensor, ...]:
    """What the kernel finds for local queries (..., m, 3) among local points (..., n, 3).

    of: how many of both all ranks have. Where a rank has none, it runs on a point that is nowhere,
    as the kernels and their backward take no empty tensors.
    """
    search, lead = _op(), queries.shape[:-1]
    if not all(of):
        return search(points, queries, *args)
    every = list(range(queries.ndim - 1))
    found = search(with_one(points, every, nan), with_one(queries, every, nan), *args)
    if queries.numel() or args[1] is None:
        return found
    ends = tuple(slice(n) for n in lead)
    return tuple(x[ends] if x.numel() else x for x in found)


def _some(
    points: Tensor, queries: Tensor, radius: float, most: int, dists: bool, coordinates: bool
) -> tuple[Tensor, ...]:
    """At most so many for each query: (B, M, most) and more."""
    if not cut_axes(dims_of(points)[1]):
        return _among_all(points, queries, radius, most, dists, coordinates)
    points, queries = (_by_points(x, points, queries) for x in (points, queries))
    rows: list[list[Tensor]] = []
    of = points.shape[-2], queries.shape[-2]
    for p, q in zip(points.unbind(0), queries.unbind(0), strict=True):
        met = meet(q, p)
        close = near(met, radius)
        index, *rest, counts = _stock(close.rows, met.asking, of, radius, most, dists, coordinates)
        used = torch.arange(most, device=index.device) < counts[:, None]
        # where a rank has no points, every entry is unused
        index = torch.where(used, pad(close.at, (0, 1))[index], 0).to(index.dtype)
        rows.append([index, *rest, counts])
    locals_, mesh = [torch.stack(xs) for xs in zip(*rows, strict=True)], mesh_of(points, queries)
    lead = Dim(len(points)), met.out
    made = []
    for x, asked in zip(locals_, (True, coordinates, dists, True), strict=True):
        if asked:
            made.append(wrap(x, Spec(mesh, (*lead, *whole_dims(x.shape[2:])))))
        else:
            made.append(_whole(x[0], mesh))
    return tuple(made)


def _among_all(
    points: Tensor, queries: Tensor, radius: float, most: int, dists: bool, coordinates: bool
) -> tuple[Tensor, ...]:
    """The same where every rank has all points of its samples."""
    rest: dict[int, Tensor] = {}
    of = points.shape[-2], queries.shape[-2]

    def search(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        out = _stock(p, q, of, radius, most, dists, coordinates)
        rest.update({i: x for i, x in enumerate(out) if (i, False) in flags})
        return tuple(x for i, x in enumerate(out) if (i, True) in flags)

    flags = {(0, True), (1, coordinates), (2, dists), (3, True)}
    terms = ["b q k", "b q k X", "b q k", "b q"]
    wanted = [t for i, t in enumerate(terms) if (i, True) in flags]
    made = iter(run(f"b P X, b q X -> {', '.join(wanted)}", search, points, queries))
    mesh = mesh_of(points, queries)
    return tuple(_whole(rest[i], mesh) if i in rest else next(made) for i in range(4))


def _whole(x: Tensor, mesh: DeviceMesh) -> ShardTensor:
    return wrap(x, Spec.whole(mesh, x.shape))


def _by_points(x: Tensor, *others: Tensor) -> Tensor:
    """x of whole samples and whole coordinates; what cut these cuts its points."""
    if not isinstance(x, ShardTensor):
        return x
    x = reduced(x)
    dims = x._spec.dims
    if not cut_axes(dims[0]) and not cut_axes(dims[2]):
        return x
    rows = Dim.chunked(dims[1].size, sorted(axes_in(dims)), x._spec.mesh)
    return to_dims(x, (dims[0].whole, rows, dims[2].whole))


def _all(
    points: Tensor, queries: Tensor, radius: float, dists: bool, coordinates: bool
) -> tuple[Tensor, ...]:
    """All of each query: (sample, query, point) of every pair (3, E), and more."""
    points, queries = (_by_points(x, points, queries) for x in (points, queries))
    found: list[tuple[Tensor, ...]] = []
    mesh = mesh_of(points, queries)
    of = points.shape[-2], queries.shape[-2]
    for b, (p, q) in enumerate(zip(points.unbind(0), queries.unbind(0), strict=True)):
        met = meet(q, p)
        close = near(met, radius)
        index, rows, d, counts = _stock(
            close.rows, met.asking, of, radius, None, dists, coordinates
        )
        here = Spec(mesh, (met.out,)).offset[0] + index[0].long()
        sample = torch.full_like(here, b)
        index = torch.stack([sample, here, close.at[index[1]]]).to(index.dtype)
        pairs = _pairs(mesh, met.out, index.shape[1], index)
        found.append((
            wrap(index, Spec(mesh, (Dim(3), pairs))),
            wrap(rows, Spec(mesh, (pairs, Dim(3)))) if coordinates else _whole(rows, mesh),
            wrap(d, Spec(mesh, (pairs,))) if dists else _whole(d, mesh),
            _whole(counts, mesh),
        ))  # fmt: skip
    if len(found) == 1:
        return found[0]
    every, places, apart, empty = (list(xs) for xs in zip(*found, strict=True))
    return (
        torch.cat(every, 1),
        torch.cat(places) if coordinates else places[0],
        torch.cat(apart) if dists else apart[0],
        empty[0],
    )


def _pairs(mesh: DeviceMesh, out: Dim, n: int, like: Tensor) -> Dim:
    """The dim of n entries that each rank found for its queries."""
    axes = out.axes
    if not axes:
        return Dim(n)
    sizes = comm.counts(n, like, comm.group(mesh, axes))
    return Dim(sum(sizes), axes, sizes)


@rule("physicsnemo.models.figconvnet.warp_neighbor_search.radius_search_warp")
def neighbors(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and distances of all points within a radius, and where those of each query begin."""
    return _neighbors(function.__wrapped__, *args, **kwargs)


neighbors.takes_function = True  # type: ignore[attr-defined]


def _neighbors(
    original: Any, points: Tensor, queries: Tensor, radius: float, grid_dim: Any = (128, 128, 128)
) -> tuple[Tensor, Tensor, Tensor]:
    met = meet(queries, points)
    close = near(met, radius)
    with torch.no_grad():
        rows, asking = (x.detach().contiguous() for x in (close.rows, met.asking))
        if len(points) and len(queries):
            rows, asking = (with_one(x, [0], nan) for x in (rows, asking))
        index, dist, splits = original(rows, asking, radius, grid_dim)
        splits = splits[: len(met.asking) + 1]
    mesh, out = mesh_of(points, queries), met.out
    pairs = _pairs(mesh, out, len(index), index)
    spec = Spec(mesh, (pairs,))
    index = close.at[index].to(index.dtype)
    splits = splits + spec.offset[0]
    ends = Dim(out.size + 1)
    if out.axes:
        ends = Dim(out.size + 1, out.axes, (*out.sizes[:-1], out.sizes[-1] + 1))
        splits = splits[: Spec(mesh, (ends,)).local_shape[0]]
    return wrap(index, spec), wrap(dist, spec), wrap(splits, Spec(mesh, (ends,)))
