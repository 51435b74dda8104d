"""The local tensor of one spec from that of another, by the cheapest chain of collectives."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import comm
from ..cache import cached
from ..cuts import Cut, cut
from ..errors import UnsupportedOpError
from ..spec import Dim, Spec
from .dense import refuse_not_dense


def convert(local: Tensor, old: Spec, new: Spec, read: bool = False) -> Tensor:
    """The local tensor of `new` from that of `old`.

    One all-to-all where a mesh axis moves from one dim to another or sizes change, a slice where a
    replicated axis becomes sharded, an all-gather where a sharded axis becomes replicated, a
    reduce-scatter from partial to sharded.
    read: nothing else is done with it, so it may be a view with gaps.
    """
    if old.shape != new.shape or old.mesh != new.mesh:
        raise ValueError(f"cannot convert {old} to {new}")
    if local.layout is not torch.strided:
        refuse_not_dense(local.layout)
    kept = tuple(p for p in old.partial if p in new.partial)
    local, dims = _settle_partial(local, old, new, kept)
    local, dims = _move_axes(local, old, dims, new.dims, read)
    for d, (have, want) in enumerate(zip(dims, new.dims, strict=True)):
        if have.sizes != want.sizes:
            local = _recut(local, old.mesh, d, have, want)
    for axis, op in new.partial:
        if (axis, op) not in kept:
            local = _make_partial(local, new.mesh, axis, op)
    return local


def _recut(local: Tensor, mesh: DeviceMesh, d: int, have: Dim, want: Dim) -> Tensor:
    return comm.window(local, d, have.sizes, want.spans, comm.group(mesh, have.axes))


def _settle_partial(
    local: Tensor, old: Spec, new: Spec, kept: tuple[tuple[int, str], ...]
) -> tuple[Tensor, list[Dim]]:
    """Add up addends that the new spec does not keep; straight into a shard where it can."""
    dims = list(old.dims)
    for axis, op in old.partial:
        if (axis, op) in kept:
            continue
        name = comm.group(old.mesh, (axis,))
        into = next((d for d, w in enumerate(new.dims) if w.axes == (axis,)), None)
        if op == "sum" and into is not None and not dims[into].axes:
            sizes = new.dims[into].sizes
            local = comm.reduce_scatter(local, into, sizes, name)
            dims[into] = new.dims[into]
        elif op == "avg":
            local = comm.reduce(local, name) / old.mesh.size(axis)
        else:
            local = comm.reduce(local, name, op)
    return local, dims


def _make_partial(local: Tensor, mesh: DeviceMesh, axis: int, op: str) -> Tensor:
    """A replicated value as addends: whole on the axis' first rank, zero on the others."""
    name = comm.group(mesh, (axis,))
    if op == "avg":
        return comm.vary([local], name)[0]
    if op != "sum":
        raise UnsupportedOpError(f"redistribute to Partial({op!r}): only sum and avg")
    return comm.addend(local, name)


def _block(dim: Dim, mesh: DeviceMesh, depth: int) -> Cut:
    """The sizes of this rank's sub-blocks along axis `depth` of a dim's axes."""
    place = mesh.get_coordinate()
    assert place is not None
    at = tuple([place[a] for a in dim.axes[:depth]])
    return _blocks(dim, at, tuple([mesh.size(a) for a in dim.axes[: depth + 1]]))


@cached
def _blocks(dim: Dim, at: tuple[int, ...], parts: tuple[int, ...]) -> Cut:
    """The sizes of the sub-blocks of the block at these coordinates along the first axes."""
    first, length = 0, len(dim.sizes)
    for i, n in zip(at, parts, strict=False):
        length //= n
        first += i * length
    ends = dim.edges[first : first + length + 1 : length // parts[-1]]
    return cut(np.diff(ends).tolist())


def _outer(dim: Dim, mesh: DeviceMesh, depth: int) -> Dim:
    """A dim sharded only by the first `depth` of its axes."""
    if depth in (0, len(dim.axes)):
        return dim if depth else dim.whole
    return _coarse(dim, depth, prod(mesh.size(a) for a in dim.axes[depth:]))


@cached
def _coarse(dim: Dim, depth: int, step: int) -> Dim:
    return Dim(dim.size, dim.axes[:depth], np.diff(dim.edges[::step]).tolist())


def _move_axes(
    local: Tensor, spec: Spec, have: list[Dim], want: Sequence[Dim], read: bool
) -> tuple[Tensor, list[Dim]]:
    """Bring every mesh axis to the dim where `want` has it, innermost axes of a dim first."""
    mesh = spec.mesh
    have = list(have)
    while True:
        # a dim may take its next axis once what it has is the start of what it wants
        moved = False
        for new, w in enumerate(want):
            depth = len(have[new].axes)
            if depth >= len(w.axes) or have[new].axes != w.axes[:depth]:
                continue
            axis = w.axes[depth]
            target = _outer(w, mesh, depth + 1)
            coarse = _outer(target, mesh, depth)
            old = next((d for d, h in enumerate(have) if axis in h.axes), None)
            if old is not None and have[old].axes[-1] != axis:
                continue
            if have[new].sizes != coarse.sizes:
                local = _recut(local, mesh, new, have[new], coarse)
            name = comm.group(mesh, (axis,))
            inner = _block(target, mesh, depth)
            if old is None:
                local = comm.split(local, new, inner, name, read)
            else:
                source = have[old]
                local = comm.swap(
                    local, old, new, _block(source, mesh, len(source.axes) - 1), inner, name
                )
                have[old] = _outer(source, mesh, len(source.axes) - 1)
            have[new] = target
            moved = True
        if moved:
            continue
        for d, (h, w) in enumerate(zip(have, want, strict=True)):
            if h.axes != w.axes[: len(h.axes)]:
                depth = len(h.axes) - 1
                name = comm.group(mesh, (h.axes[-1],))
                local = comm.gather(local, d, _block(h, mesh, depth), name)
                have[d] = _outer(h, mesh, depth)
                moved = True
                break
        if not moved:
            return local, have
