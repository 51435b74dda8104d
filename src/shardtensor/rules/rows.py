"""Rows by global index, `read` from and written (`write`) to a dim that may be sharded.

The indexed dim comes first; index, rows and values may be plain or sharded, by any axes. Reads ask
the owners of the rows and sums go to them along a route (`comm.route`) that is found once for an
index. For any other write each owner fetches the entries that fall into its rows and runs the
stock op. An index that is the same on all ranks needs no asking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, comm
from ..cache import cached
from ..comm.route import Route, deliver, fetch, find, parts_of
from ..spec import Dim, Spec, axes_in
from ..tensor import ShardTensor, wrap
from ..tensor.apart import alike, of_rows
from ..tensor.redistribute import fit, like
from . import routes
from .empty import with_one
from .nodes import note
from .operands import Dims, cut_axes, dims_of, lifted, mesh_of

# kernel(rows, index (E,), values (E, ...)) gives the rows after the write; values may be None
Kernel = Callable[[Tensor, Tensor, Any], Tensor]
# what torch calls an index out of range there is a RuntimeError, an IndexError elsewhere
_RUNTIME = ("gather", "index_add", "scatter", "scatter_add", "scatter_reduce")
# gloo cannot add these up
_NO_SUM = (torch.int16, torch.uint16, torch.uint32, torch.uint64)


@cached
def covering(mesh: DeviceMesh, dims: Dims, need: tuple[int, ...], banned: tuple[int, ...]) -> Dims:
    """Dims of an index that no banned axis shards and every needed one does."""
    new = [d.whole if set(d.axes) & set(banned) else d for d in dims]
    missing = tuple(a for a in need if a not in axes_in(new))
    if missing:
        to = max(range(len(new)), key=lambda i: (not new[i].axes, new[i].size))
        axes = sorted((*new[to].axes, *missing))
        new[to] = Dim.chunked(new[to].size, axes, mesh)
    return tuple(new)


@cached
def entry_counts(index: Spec, axes: tuple[int, ...]) -> tuple[int, ...]:
    """How many entries of an index each rank of the group over `axes` holds."""
    return tuple(prod(index.local_shape_at(at)) for at in index.places(axes))


def normal(at: Tensor, spec: Spec, size: int, negative: bool | None, op: str) -> Tensor:
    """The local part of an index as int64 in [0, size); all ranks raise where any entry is not.

    negative: whether entries may count from the end; None: all are known to be right. One small
    message where ranks hold different entries.
    """
    if negative is None:
        return at.long()
    # those of a batch are refused before a rank looks at its own
    at = _torch.unwrapped(at)
    if at.dtype not in (torch.int64, torch.int32):
        raise IndexError(f"{op}: an index of {at.dtype}; expected int64")
    at = at.long()
    if not _torch.is_tracing():
        low, high = torch.stack(at.aminmax()).tolist() if at.numel() else (0, -1)
        bad = int(low < (-size if negative else 0) or high >= size)
        axes = axes_in(spec.dims)
        if any(comm.faults(bad, at, comm.group(spec.mesh, axes)) if axes else [bad]):
            kind = RuntimeError if op in _RUNTIME else IndexError
            raise kind(f"{op}: index out of bounds for a dimension of size {size}")
        if low >= 0:
            # no other tensor of the index's size
            return at
    return torch.where(at < 0, at + size, at) if negative else at


def bounded(index: Tensor, at: Tensor, spec: Spec, size: int, op: str) -> Tensor:
    """`normal` of an index without negative entries, of which `at` is the local part.

    Once for an index that is used again, where a look at it waits for a device.
    """
    if _torch.is_tracing() or not routes.waits(at):
        return normal(at, spec, size, False, op)

    def look() -> bool:
        normal(at, spec, size, False, op)
        return True

    every = comm.group(spec.mesh, axes_in(spec.dims))
    routes.route_of(index, at, (spec, size, "bounds"), every, look)
    return at.long()


def integers(index: Tensor, op: str) -> Tensor:
    """The index; an empty one may have any dtype."""
    if index.numel() and index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{op}(): Expected dtype int32/int64 for index")
    return index if index.numel() else index.long()


def read(
    x: Tensor, index: Tensor, *, negative: bool | None = True, op: str = "index"
) -> ShardTensor:
    """x[index]: the dims of the index (of any shape), then those of x but the first.

    Differentiable. Sharded where the index is, else over the ranks that hold x's rows; an index of
    fewer entries than ranks gives a result that each of them has. negative: whether entries may
    count from the end; None: all are known to be right. op: the name in errors. IndexError, or
    torch's RuntimeError, where an entry is out of bounds: on all ranks if x's rows are cut, else on
    those that have the entry. Sends each row that a rank needs of another once.
    """
    mesh = mesh_of(x, index)
    (rows, *rest), own = dims_of(x), dims_of(index)
    if cut_axes(rows):
        note(mesh, rows)
    need, taken = cut_axes(rows), axes_in(rest)
    own = covering(mesh, own, (), taken)
    few = index.numel() < len(rows.sizes) and x.dtype not in _NO_SUM
    few = few and not set(need) & set(axes_in(own))
    dims = own if few else covering(mesh, own, need, ())
    varying = sorted({*rows.axes, *taken, *axes_in(dims)})
    local, at = fit(mesh, varying, (x, (rows, *rest)), (index, dims))
    out = Spec(mesh, (*dims, *rest))
    if not need and (not at.numel() or rows.size):
        # index_select refuses what counts from the end
        if negative is False and at.ndim == 1:
            return wrap(of_rows(x, not axes_in(dims), local.index_select, 0, at), out)
        return wrap(alike(not axes_in(dims), local.__getitem__, at.long()), out)
    spec, group = Spec(mesh, dims), comm.group(mesh, rows.axes)
    if not few and not _torch.is_tracing():
        parts = _parts(rows.sizes, (*rest,), local.element_size())
        route = _route(index, at, spec, rows, negative, op, parts)
        return wrap(fetch(local, route).reshape(out.local_shape), out)
    at = normal(at, spec, rows.size, negative, op)
    if few:
        mine, here = _own(at, rows, group)
        found = with_one(local, (0,), 0)[torch.where(mine, here, 0)]
        mine = mine.reshape(*mine.shape, *[1] * len(rest))
        # numbers stand for truth values on the way
        return wrap(comm.reduce(torch.where(mine, found, 0), group).to(x.dtype), out)
    found = comm.take(local, at.reshape(-1), rows.sizes, group)
    return wrap(found.reshape(out.local_shape), out)


@cached
def _parts(counts: tuple[int, ...], rest: Dims, item: int) -> int:
    """In how many parts rows travel, of which each rank has counts; alike on all ranks."""
    return parts_of(max(counts), prod(max(d.sizes, default=d.size) for d in rest), item)


def _route(
    index: Tensor, at: Tensor, spec: Spec, rows: Dim, negative: bool | None, op: str, parts: int
) -> Route:
    """The route of an index, of which this rank has the entries `at`, into a dim."""
    group = comm.group(spec.mesh, rows.axes)
    every = comm.group(spec.mesh, tuple(sorted({*rows.axes, *axes_in(spec.dims)})))

    def make() -> Route:
        given = normal(at, spec, rows.size, negative, op).reshape(-1)
        return find(given, rows.sizes, group, parts)

    return routes.route_of(index, at, (spec, rows, negative, group, parts), every, make)


def _entries(
    index: Tensor,
    at: Tensor,
    spec: Spec,
    rows: Dim,
    rest: Sequence[Dim],
    values: Tensor,
    negative: bool | None,
    op: str,
) -> tuple[Tensor, Route]:
    """Of the entries of all ranks that fall into this rank's rows: which rows; whence they come."""
    group, counts = comm.group(spec.mesh, rows.axes), entry_counts(spec, rows.axes)
    parts = _parts(counts, (*rest,), values.element_size())
    every = comm.group(spec.mesh, tuple(sorted({*rows.axes, *axes_in(spec.dims)})))

    def make() -> tuple[Tensor, Route]:
        given = normal(at, spec, rows.size, negative, op).reshape(-1)
        mine, entries = comm.asked(given, rows.sizes, counts, group)
        return mine, find(entries, counts, group, parts)

    return routes.route_of(index, at, (spec, rows, negative, group, parts, "entries"), every, make)


def write(
    x: Tensor,
    index: Tensor,
    values: Tensor | None,
    kernel: Kernel | None,
    *,
    negative: bool | None = False,
    op: str = "index",
) -> ShardTensor:
    """x with values written at x[index], sharded as x is; kernel None: added. Differentiable.

    values: the dims of the index, then those of x but the first; None where the kernel has its own.
    kernel(rows, index, values) gives rows after the write, of entries that fall into these rows.
    Dims in which x is whole follow the values, but for the indexed one. negative, op: as in `read`.
    """
    mesh = mesh_of(x, index, values)
    old, own = dims_of(x), dims_of(index)
    given = dims_of(values) if values is not None else (*own, *(d.whole for d in old[1:]))
    dims, lead = _layout(mesh, old, own, given)
    first, lead = placed(mesh, dims[0], lead, kernel is None)
    dims = (first, *dims[1:])
    rows, *rest = dims
    varying = sorted({*axes_in(dims), *axes_in(lead)})
    v, at = fit(mesh, varying, (values, (*lead, *rest)), (index, lead))
    v = None if v is None else v.reshape(at.numel(), *v.shape[len(own) :])
    local = like(lifted(x, index, values), Spec(mesh, dims))._local
    spec, have = Spec(mesh, lead), axes_in(lead)
    asks = bool(set(cut_axes(rows)) & set(have))
    if kernel is None and v is not None and asks and not _torch.is_tracing():
        parts = _parts(rows.sizes, (*rest,), v.element_size())
        part = deliver(v, _route(index, at, spec, rows, negative, op, parts), len(local))
        new = local + _summed(part, mesh, tuple(a for a in have if a not in cut_axes(rows)))
    elif kernel is not None and v is not None and asks and not _torch.is_tracing():
        mine, route = _entries(index, at, spec, rows, rest, v, negative, op)
        new = kernel(local, mine, fetch(v, route))
    else:
        at = normal(at, spec, rows.size, negative, op).reshape(-1)
        new = settle(local, at, v, kernel, rows, spec, have)
    final = (rows if old[0].axes else rows.whole, *rest)
    return like(wrap(new, Spec(mesh, dims)), Spec(mesh, final))


@cached
def _layout(mesh: DeviceMesh, old: Dims, own: Dims, given: Dims) -> tuple[Dims, Dims]:
    """(dims of the target, dims of the index) for a write."""
    n = len(own)
    dims = list(old)
    for i, d in enumerate(given[n:], 1):
        if d.axes and not dims[i].axes and not set(d.axes) & set(axes_in(dims)):
            dims[i] = d
    lead = list(covering(mesh, given[:n], (), axes_in(dims[1:])))
    for i, d in enumerate(own):
        if d.axes and not lead[i].axes and not set(d.axes) & set(axes_in([*lead, *dims[1:]])):
            lead[i] = d
    return tuple(dims), tuple(lead)


def placed(mesh: DeviceMesh, rows: Dim, lead: Sequence[Dim], adds: bool) -> tuple[Dim, Dims]:
    """How the rows of a target and the entries of an index meet: (rows, dims of the index)."""
    need, have = cut_axes(rows), axes_in(lead)
    if not adds and _torch.is_tracing():
        # how many entries an owner gets depends on values: each rank takes its own from all
        return rows, covering(mesh, tuple(lead), (), have)
    if not need and have and not adds:
        # ranks with entries of their own share the rows out
        rows = Dim.chunked(rows.size, have, mesh)
        need = cut_axes(rows)
    if not adds:
        lead = covering(mesh, tuple(lead), (), tuple(a for a in have if a not in need))
    if set(axes_in(lead)) & set(need):
        lead = covering(mesh, tuple(lead), need, ())
    return rows, tuple(lead)


def settle(
    local: Tensor,
    at: Tensor,
    values: Any,
    kernel: Kernel | None,
    rows: Dim,
    index: Spec,
    have: tuple[int, ...],
) -> Tensor:
    """The local rows after the write of this rank's entries and those of others.

    index: how the entries lie, by `placed`; have: the axes along which they differ.
    """
    mesh, need = index.mesh, cut_axes(rows)
    asks = bool(set(need) & set(have))
    group = comm.group(mesh, need) if need else ""
    if kernel is None:
        extra = tuple(a for a in have if a not in need)
        if asks:
            return local + _summed(comm.put(values, at, rows.sizes, group), mesh, extra)
        some, at, values = _mine(local, at, values, rows, group) if need else (local, at, values)
        if extra:
            part = torch.zeros_like(some).index_add(0, at, values)
            return local + _summed(part[: len(local)], mesh, extra)
        return some.index_add(0, at, values)[: len(local)]
    if asks:
        counts = entry_counts(index, need)
        at, entries = comm.asked(at, rows.sizes, counts, group)
        values = None if values is None else comm.take(values, entries, counts, group)
        return kernel(local, at, values)
    if need:
        some, at, values = _mine(local, at, values, rows, group)
        return kernel(some, at, values)[: len(local)]
    return kernel(local, at, values)


def _summed(x: Tensor, mesh: DeviceMesh, axes: tuple[int, ...]) -> Tensor:
    return comm.reduce(x, comm.group(mesh, axes)) if axes else x


def _own(at: Tensor, rows: Dim, group: str) -> tuple[Tensor, Tensor]:
    """(which global rows are this rank's, all of them counted from its first)."""
    me = comm.rank(group)
    own = at - rows.offsets[me]
    return (own >= 0) & (own < rows.sizes[me]), own


def _mine(
    local: Tensor, at: Tensor, values: Any, rows: Dim, group: str
) -> tuple[Tensor, Tensor, Any]:
    """The entries of an index, alike on all ranks, that fall into this rank's rows."""
    mine, own = _own(at, rows, group)
    if _torch.is_tracing():
        # no sizes that depend on values: what others own goes to one more row, which is cut off
        some = torch.cat([local, local.new_zeros((1, *local.shape[1:]))])
        return some, torch.where(mine, own, len(local)), values
    return local, own[mine], None if values is None else values[mine]
