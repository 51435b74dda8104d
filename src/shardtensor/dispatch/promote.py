"""A plain tensor that becomes a ShardTensor where it stands.

Models allocate a plain tensor and assign parts to it: `out = torch.zeros(...)`, then
`out[:, :, :m] = modes`. Once a sharded part is assigned, the tensor that single-device code sees is
a sharded one. Every name of it sees the ShardTensor, as the Python object stays the same. It is
done only where no other tensor or array shares the memory, nothing but one variable holds the
tensor (a module's buffer stays plain) and all ranks agree.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from inspect import CO_OPTIMIZED
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, cache, comm
from .._torch import probe
from ..caller import caller
from ..comm import wire
from ..spec import Dim, Spec, whole_dims
from ..tensor import wrap


def adopt(
    x: Tensor,
    entries: Sequence[Any],
    value: Spec,
    zeros: Callable[[Spec, torch.dtype, torch.device], Tensor],
) -> bool:
    """Turn the plain x of `x[entries] = value` into a ShardTensor that lies as value does.

    entries: a slice or an integer for each dim of x. Call it from a handler that has x, its first
    argument, in one local variable. One message to agree. Returns whether x is a ShardTensor now.
    zeros: makes what x becomes where it is complex and nothing but zeros on all ranks.
    """
    references = sys.getrefcount(x)
    if _torch.is_tracing() or not value.varying or value.partial:
        return False
    spec = _spec(tuple(x.shape), tuple(isinstance(e, slice) for e in entries), value)
    only = _is_only(references, _USUAL, _usual)
    return _become(x, spec, only, value.mesh, zeros)


def adopt_rows(x: Tensor, spec: Spec, *, indexed: bool) -> bool:
    """Turn the plain x whose rows are written by global index into one that lies as spec.

    indexed: by `x[index] = value`, index a tensor, not by `x.scatter_add_(...)` and its kin. As
    `adopt`: from a handler that has x in one local variable; one message to agree.
    """
    references = sys.getrefcount(x)
    if _torch.is_tracing():
        return False
    known, count = (_USUAL, _usual) if indexed else (_USUAL_OF_METHOD, _usual_of_method)
    return _become(x, spec, _is_only(references, known, count), spec.mesh, None)


def _become(
    x: Tensor,
    spec: Spec | None,
    only: bool,
    mesh: DeviceMesh,
    zeros: Callable[[Spec, torch.dtype, torch.device], Tensor] | None,
) -> bool:
    """Whether x became a ShardTensor. only: whether nothing but one variable holds it."""
    # what is remembered of x would hold its object fast
    cache.forget(x)
    mine = spec is not None and only and _is_variable(x) and _alone(x)
    group = comm.group(mesh, tuple(range(mesh.ndim)))
    # a plan takes what is filled with modes for zeros
    fake = probe.is_fake(x)
    blank = (
        mine and zeros is not None and x.is_complex() and (fake or not torch.view_as_real(x).any())
    )
    agreed = wire.all_reduce([torch.tensor([mine, blank], device=x.device).int()], "min", group)
    all_may, all_blank = (mine, blank) if fake else agreed[0].tolist()
    if not all_may or spec is None:
        return False
    if all_blank and zeros is not None:
        torch.utils.swap_tensors(x, zeros(spec, x.dtype, x.device))
        return True
    local = x
    for d, dim in enumerate(spec.dims):
        if dim.axes:
            i = spec.index[d]
            start, stop = dim.spans[i]
            local = local.narrow(d, start, stop - start)
    local = local.clone(memory_format=torch.contiguous_format)
    torch.utils.swap_tensors(x, wrap(local, spec))
    return True


def _user() -> tuple[FrameType | None, bool]:
    """The frame of the calling code, and whether a default device stands between."""
    frame = caller()
    through = frame is not None and frame.f_code is _torch.DEVICE_CONTEXT
    return frame.f_back if through and frame is not None else frame, through


def _is_only(references: int, known: int, count: Callable[[], int]) -> bool:
    """Whether that many references are those of one variable that is in a call.

    known: how many these are; count: counts them now.
    """
    if _user()[1]:
        with torch.device("cpu"):
            return references == count()
    # once dynamo has raised, every call of this thread holds its arguments once more
    return references == known or references == count()


def _is_variable(x: Tensor) -> bool:
    """Whether the calling code has x as a variable, not as an attribute or an element."""
    frame, _ = _user()
    if frame is None:
        return False
    names = frame.f_locals
    found = any(v is x for v in names.values())
    if frame.f_code.co_flags & CO_OPTIMIZED and _is_copy(names):
        # the frame keeps it, and so would hold the function's other tensors a second time
        names.clear()
    return found


def _is_copy(names: Any) -> bool:
    """Whether the variables of a function are a copy (until Python 3.12) that only it has."""
    return type(names) is dict and sys.getrefcount(names) == 1 + _of_a_call()


def _of_a_call() -> int:
    """References to what one variable holds and an argument: once more after dynamo has raised."""
    variable: dict[str, Any] = {}
    return _references(variable)


def _references(x: Any) -> int:
    return sys.getrefcount(x)


def _alone(x: Tensor) -> bool:
    """Whether a tensor's memory is its own, and no gradient flows through it."""
    plain = (type(x) is Tensor or probe.is_fake(x)) and x.is_leaf and not x.requires_grad
    free = not weakref.getweakrefcount(x)
    return plain and free and x.layout is torch.strided and _torch.owns_memory(x)


def _spec(shape: tuple[int, ...], sliced: tuple[bool, ...], value: Spec) -> Spec | None:
    """The spec of a tensor into whose slices a value is assigned: sharded where the value is."""
    kept = [d for d, s in enumerate(sliced) if s]
    dims = list(whole_dims(shape))
    for i, dim in enumerate(value.dims, len(kept) - len(value.dims)):
        if dim.axes and i >= 0:
            n = shape[kept[i]]
            cut = dim if dim.size == n else Dim.chunked(n, dim.axes, value.mesh)
            dims[kept[i]] = cut
    spec = Spec(value.mesh, tuple(dims))
    return spec if spec.varying == value.varying else None


class _Probe(torch.Tensor):
    """Counts references to the tensor that it is assigned to, by the way that `adopt` is called."""

    seen = 0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _handle(func, args, kwargs or {})


def _handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x, *_ = args
    _count(x)


def _count(x: Tensor) -> None:
    _Probe.seen = sys.getrefcount(x)


def _usual() -> int:
    """How many references there are to a tensor that one variable holds."""
    with _torch.outside_modes():
        out = torch.zeros(1)
        out[0:1] = torch.zeros(1).as_subclass(_Probe)
    return _Probe.seen


def _usual_of_method() -> int:
    """The same where a method of it is called."""
    with _torch.outside_modes():
        out = torch.zeros(1)
        out.scatter_add_(0, torch.zeros(1).as_subclass(_Probe), torch.zeros(1))
    return _Probe.seen


_USUAL = _usual()
_USUAL_OF_METHOD = _usual_of_method()
