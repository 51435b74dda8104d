"""What rules ask of their operands: mesh and dims, dims by number, no addends, a dim whole."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..dispatch.writes import stands_for_rows, stands_for_view
from ..spec import Dim, Spec, whole_dims
from ..tensor import ShardTensor, recut, wrap
from ..tensor.convert import convert
from ..tensor.recut import lasting
from ..tensor.redistribute import like, reduced, to_dims

Dims = tuple[Dim, ...]


def mesh_of(*xs: object) -> DeviceMesh:
    """The mesh of the first ShardTensor."""
    return next(x._spec.mesh for x in xs if isinstance(x, ShardTensor))


def dims_of(x: Tensor) -> Dims:
    """How x lies; whole for a plain tensor."""
    return x._spec.dims if isinstance(x, ShardTensor) else whole_dims(x.shape)


def cut_axes(dim: Dim) -> tuple[int, ...]:
    """The mesh axes of a dim that lies in several shards."""
    return dim.axes if dim.is_cut else ()


def lifted(x: Tensor, *others: object) -> ShardTensor:
    """x without addends; a plain one lies whole on the mesh of another operand."""
    if isinstance(x, ShardTensor):
        return reduced(x) if x._spec.partial else x
    return wrap(x, Spec.whole(mesh_of(*others), x.shape))


def summed(x: Any) -> Any:
    """A tensor without partial sums; the first dim of a 0-dim one."""
    if not isinstance(x, Tensor):
        return x
    x = reduced(x)
    return x if x.ndim else x.reshape(1)


def in_order(out: Any, x: Tensor | None = None) -> Any:
    """A result with its rows first in memory, as torch gives it; as it is if x lies otherwise."""
    return out.contiguous() if x is None or x.is_contiguous() else out


def many(first: Any, rest: tuple[Any, ...] = ()) -> tuple[int, ...]:
    """The integers of f(1, 2), f((1, 2)), f(torch.Size([1, 2])) and f(1, torch.tensor(2))."""
    return tuple(map(index, first if isinstance(first, list | tuple) else (first, *rest)))


def checked_dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise IndexError(f"Dimension out of range (expected to be in [{-ndim}, {ndim - 1}])")
    return dim % ndim


def moved(x: ShardTensor, dims: Sequence[Dim], op: str) -> ShardTensor:
    """x in other dims, for an op that is a view in torch; addends stay addends."""
    y = like(x, Spec(x._spec.mesh, tuple(dims), x._spec.partial))
    if y is not x:
        stands_for_view(y._local, x._local, op)
    return y


def whole_in(x: ShardTensor, dims: Sequence[int], op: str, lost: bool = False) -> ShardTensor:
    """x with some dims gathered; where they are `lost` and it is large, others are cut instead."""
    if not any(x._spec.dims[d].axes for d in dims):
        return x
    spec = x._spec
    there = lasting(spec, tuple(dims)) if lost and spec.shape.numel() >= recut.WHOLE else spec
    whole = there.whole_in(dims).dims
    if spec.partial:
        return moved(x, whole, op)
    y = to_dims(x, whole)
    gathered = y._spec

    def write(base: Tensor, rows: Tensor) -> None:
        # x may have other dims by then (squeeze_, t_).
        # The memory of y keeps this function, which must not keep y
        base.copy_(convert(rows, gathered, spec))

    stands_for_rows(y._local, x, op, write)
    return y
