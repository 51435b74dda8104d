"""From one spec to another, differentiably, and operands made to meet.

`convert` moves a local tensor between two specs; `fit` gives the local values of operands in the
sharding that a rule asks for, each with the right cotangent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, comm
from ..cache import cached
from ..comm import groups
from ..comm.formats import FORMATS
from ..cuts import Cut, cut
from ..errors import UnsupportedOpError
from ..later import dt
from ..registry import method
from ..spec import Dim, Spec, whole_dims
from . import layout
from .aliases import relate
from .dense import refuse_not_dense
from .shard_tensor import ShardTensor, wrap

Wanted = Sequence[Dim] | None
X = TypeVar("X")
A = TypeVar("A", Tensor, Tensor | None)
B = TypeVar("B", Tensor, Tensor | None)
C = TypeVar("C", Tensor, Tensor | None)
D = TypeVar("D", Tensor, Tensor | None)
# an operand and the dims it is wanted in; None: whole
Given = tuple[A, Wanted]

# what is whole on every rank as it is
PLAIN = (Tensor, nn.Parameter)
_DTENSOR = "a DTensor beside a ShardTensor: use ShardTensor.from_dtensor(d), or d.full_tensor()"


@method
def replicate(x: ShardTensor) -> ShardTensor:
    """The tensor whole on every rank."""
    if x.numel() == 1:
        groups.check_loop()
    return _formatted(to_dims(x, x._spec.replicated().dims), x)


def _formatted(y: ShardTensor, x: ShardTensor) -> ShardTensor:
    """y, what was moved of x, in the memory format of x on every rank.

    One without rows cannot tell by its own.
    """
    last = FORMATS.get(x.ndim)
    if last is None or y is x or y._local.layout is not torch.strided:
        return y
    form = torch.contiguous_format if x.is_contiguous() else last
    if not x.is_contiguous(memory_format=form) or y._local.is_contiguous(memory_format=form):
        return y
    return wrap(y._local.contiguous(memory_format=form), y._spec)


def to_dims(x: ShardTensor, dims: Sequence[Dim]) -> ShardTensor:
    """The tensor sharded as `dims` say, nothing partial."""
    spec = x._spec.with_dims(dims)
    return x if spec == x._spec else wrap(convert(x._local, x._spec, spec), spec)


def reduced(x: X) -> X:
    """A tensor with its partial sums added up; anything but a ShardTensor has none."""
    if not isinstance(x, ShardTensor) or not x._spec.partial:
        return x
    whole = to_dims(x, x._spec.dims)
    whole._strides = x._strides
    if not x._local.is_contiguous():
        whole._local = layout.in_order_of(whole._local, x._local.stride())
    # a view of the sums stands for one of x
    relate(whole._local, x._local)
    return whole  # type: ignore[return-value]


def local_of(x: X) -> X:
    """This rank's part of a tensor; anything but a ShardTensor is its own."""
    return x._local if isinstance(x, ShardTensor) else x  # type: ignore[return-value]


@method
def like(x: Tensor, spec: Spec, read: bool = False) -> ShardTensor:
    """A plain (replicated) tensor or a ShardTensor as one with this spec.

    read: nothing else is done with it, so it may be a view with gaps.
    """
    if not isinstance(x, ShardTensor):
        if type(x) is dt.DTensor:
            raise UnsupportedOpError(_DTENSOR)
        if x.shape != spec.shape:
            raise ValueError(f"a tensor of shape {tuple(x.shape)} for one of {tuple(spec.shape)}")
        x = wrap(x, spec.replicated())
    elif x._spec != spec and x.shape != spec.shape:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} for one of {tuple(spec.shape)}")
    return x if x._spec == spec else wrap(convert(x._local, x._spec, spec, read), spec)


@method
def gradient(local: Tensor, spec: Spec) -> ShardTensor:
    """The gradient of a tensor that lies as spec, from that of its local tensor."""
    if spec.partial:
        group, parts = _addends(spec)
        local = comm.alike(local if parts == 1 else local * parts, group)
    return wrap(local, spec.cotangent)


@method
def as_gradient(g: Any, spec: Spec) -> ShardTensor:
    """What is assigned as the gradient of a tensor that lies as spec."""
    if not isinstance(g, Tensor):
        kind = f"type {type(g).__name__}"
        raise TypeError(f"assigned grad expected to be a Tensor or None but got grad of {kind}")
    if g.shape != spec.shape:
        raise RuntimeError(
            f"attempting to assign a gradient of size {list(g.shape)} to a tensor of size "
            f"{list(spec.shape)}"
        )
    return like(g, spec.cotangent)


@method
def cotangent(g: Tensor, spec: Spec) -> Tensor:
    """The gradient of the local tensor from that of a tensor that lies as spec: the reverse."""
    if g.shape != spec.shape:
        raise RuntimeError(
            f"Mismatch in shape: a gradient of shape {list(g.shape)} for a tensor of shape "
            f"{list(spec.shape)}"
        )
    local = like(g, spec.cotangent)._local
    if spec.partial:
        group, parts = _addends(spec)
        (local,) = comm.vary([local if parts == 1 else local / parts], group)
    return local


def _addends(spec: Spec) -> tuple[str, int]:
    """(the ranks that hold addends of the same elements, of how many ranks they are averages)."""
    axes = tuple(a for a, _ in spec.partial)
    averaged = [spec.mesh.size(a) for a, op in spec.partial if op == "avg"]
    return comm.group(spec.mesh, axes), prod(averaged)


@method
def to_placements(
    x: ShardTensor,
    mesh: DeviceMesh | None,
    placements: Sequence[dt.Placement] | None,
    sizes: Mapping[int, Sequence[int]] | None,
) -> ShardTensor:
    """`ShardTensor.redistribute`."""
    old = x._spec
    if mesh is not None and mesh != old.mesh:
        raise ValueError("redistribute to another mesh: use full_tensor() and distribute_tensor")
    new = Spec.of(old.mesh, old.placements if placements is None else placements, old.shape, sizes)
    given = {d % max(1, x.ndim) for d in sizes or ()}
    dims = [
        o if o.axes == n.axes and i not in given else n
        for i, (o, n) in enumerate(zip(old.dims, new.dims, strict=True))
    ]
    out = _formatted(like(x, Spec(old.mesh, tuple(dims), new.partial)), x)
    if out is not x and not x.is_contiguous():
        # where it lies changes nothing of what it is on one device
        out._strides = layout.Strides.of(out._spec.shape, layout.stride(x))
    return out


def convert(local: Tensor, old: Spec, new: Spec, read: bool = False) -> Tensor:
    """The local tensor of `new` from that of `old`, by the cheapest chain of collectives.

    One all-to-all where a mesh axis moves from one dim to another or sizes change, a slice where a
    replicated axis becomes sharded, an all-gather where a sharded axis becomes replicated, a
    reduce-scatter from partial to sharded. read: see `like`.
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


def beside(spec: Spec, group: str | None, *xs: Tensor | None) -> Sequence[Tensor | None] | None:
    """Weights as `fit` gives them whole beside shards, at half its cost; None: `fit` has to.

    group: of the ranks along `spec.varying`, None without any.
    """
    given = []
    for x in xs:
        if x is not None:
            if type(x) not in PLAIN or x.layout is not torch.strided:
                return None
            given.append(x)
    if group is None or not given:
        return xs
    found: list[Any] = comm.vary(given, group, spec.mesh)
    if len(found) < len(xs):
        for i, x in enumerate(xs):
            if x is None:
                found.insert(i, None)
    return found


# one for each number of operands: a tensor's local value is a tensor, None stays None
@overload
def fit(mesh: DeviceMesh, varying: Sequence[int], a: Given[A], /) -> tuple[A]: ...
@overload
def fit(mesh: DeviceMesh, varying: Sequence[int], a: Given[A], b: Given[B], /) -> tuple[A, B]: ...
@overload
def fit(
    mesh: DeviceMesh, varying: Sequence[int], a: Given[A], b: Given[B], c: Given[C], /
) -> tuple[A, B, C]: ...
@overload
def fit(
    mesh: DeviceMesh, varying: Sequence[int], a: Given[A], b: Given[B], c: Given[C], d: Given[D], /
) -> tuple[A, B, C, D]: ...
@overload
def fit(
    mesh: DeviceMesh, varying: Sequence[int], *operands: tuple[Tensor, Wanted]
) -> tuple[Tensor, ...]: ...
@overload
def fit(
    mesh: DeviceMesh, varying: Sequence[int], *operands: tuple[Tensor | None, Wanted]
) -> tuple[Tensor | None, ...]: ...
def fit(mesh: DeviceMesh, varying: Sequence[int], *operands: tuple[Tensor | None, Wanted]) -> Any:
    """Local values of operands for a local program that varies along mesh axes `varying`.

    Each operand comes with the dims it is wanted in (None: whole). Where an operand is the same
    along a varying axis, its gradient is summed over that axis, in one message for all operands.
    Raises UnsupportedOpError, before anything is sent, for operands on different meshes.
    """
    for x, _ in operands:
        if isinstance(x, ShardTensor) and x._spec.mesh is not mesh and x._spec.mesh != mesh:
            raise UnsupportedOpError(
                f"tensors on different meshes: {x._spec.mesh} and {mesh}; distribute both on one"
            )
    under = _torch.functorch_level() is not None or _torch.dual_level() >= 0
    found: list[Tensor | None] = []
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, (x, dims) in enumerate(operands):
        if x is None:
            found.append(None)
            continue
        own: tuple[int, ...] = ()
        for d in dims or ():
            own += d.axes
        if isinstance(x, ShardTensor) and dims == x._spec.dims and not x._spec.partial:
            local = x._local
        elif own or isinstance(x, ShardTensor):
            wanted = whole_dims(x.shape) if dims is None else tuple(dims)
            local = like(x, Spec(mesh, wanted), read=True)._local
        elif type(x) is dt.DTensor:
            raise UnsupportedOpError(_DTENSOR)
        else:
            local = x
        found.append(local)
        if own == varying or not (local.requires_grad or (under and _torch.differentiated(local))):
            continue
        same = tuple([a for a in varying if a not in own]) if own else tuple(varying)
        if same:
            if local.layout is not torch.strided:
                refuse_not_dense(local.layout)
            alike.setdefault(same, []).append(i)
    for axes, picked in alike.items():
        group = comm.group(mesh, axes)
        given: list[Any] = found if len(picked) == len(found) else [found[i] for i in picked]
        for i, value in zip(picked, comm.vary(given, group, mesh), strict=True):
            found[i] = value
    return tuple(found)
