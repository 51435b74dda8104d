"""Tensors in another spec than theirs, and operands made to meet.

`like` and what stands on it give a tensor as another spec has it; `fit` gives the local values of
operands in the sharding that a rule asks for, each with the right cotangent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, comm
from ..comm import groups
from ..comm.formats import FORMATS
from ..errors import UnsupportedOpError
from ..later import dt
from ..registry import method
from ..spec import Dim, Spec, whole_dims
from . import layout
from .aliases import relate
from .convert import convert
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
