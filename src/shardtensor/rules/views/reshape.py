"""reshape and its kin: local views of the local tensor wherever the shards allow it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _torch
from ...cache import cached
from ...dispatch.writes import stands_for_view
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, layout, recut, wrap
from ...tensor.convert import convert
from ...tensor.redistribute import like, reduced, replicate
from ..agreed import agreed
from ..operands import checked_dim, many, moved
from ..pointwise import function_rule
from .reshape_plan import on_multiples, plan

# of a whole tensor; None: rows first
Stride = tuple[int, ...] | None


def _infer(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    known = prod(n for n in shape if n != -1)
    if -1 in shape:
        if known == 0 or numel % known:
            raise RuntimeError(f"shape '{list(shape)}' is invalid for input of size {numel}")
        return tuple(numel // known if n == -1 else n for n in shape)
    if known != numel:
        raise RuntimeError(f"shape '{list(shape)}' is invalid for input of size {numel}")
    return tuple(shape)


class Reshaped(NamedTuple):
    """How a tensor takes another shape.

    stays: whether shards stay. before: the dims that they need. spec: of the result, local_shape
    there. view: whether torch gives a view. even: where the result goes then, None if it stays
    there.
    """

    stays: bool
    before: tuple[Dim, ...]
    spec: Spec
    local_shape: torch.Size
    view: bool
    even: Spec | None = None


@cached
def _reshaped(spec: Spec, stride: Stride, shape: tuple[int, ...]) -> Reshaped:
    numel = spec.shape.numel()
    target = _infer(shape, numel)
    if not numel:
        before, out = spec.replicated().dims, Spec.whole(spec.mesh, target)
        return Reshaped(False, before, out, out.local_shape, True)
    before, out, even = plan(spec, target)
    view = layout.is_view(spec.shape, stride or layout.dense(spec.shape), target)
    if even is None and not view and numel >= recut.WHOLE:
        even = _evened(spec, out)
    return Reshaped(before == spec.dims, before, out, out.local_shape, view, even)


def _evened(spec: Spec, out: Spec) -> Spec | None:
    """A large result cut evenly, where rows that all are one dim's own left it lopsided.

    As of 4 windows that shared 8 ranks, and lie in 512 rows now. What is cut by sizes of its own
    stays so.
    """
    if not all(_nearly_even(d, spec) for d in spec.cuts):
        return None
    even = [Dim.chunked(d.size, d.axes, out.mesh) for d in out.dims]
    pairs = [(max(d.sizes), max(e.sizes)) for d, e in zip(out.dims, even, strict=True) if d.axes]
    lopsided = any(4 * most > 5 * least for most, least in pairs)
    return Spec(out.mesh, tuple(even), out.partial) if lopsided else None


def _nearly_even(dim: Dim, spec: Spec) -> bool:
    """Whether rows alone keep a dim from a better cut."""
    parts = len(dim.sizes)
    off = max(abs(o * parts - i * dim.size) for i, o in enumerate(dim.offsets))
    return off <= parts or dim == Dim.chunked(dim.size, dim.axes, spec.mesh)


def _reshape(x: ShardTensor, shape: Sequence[int], op: str) -> ShardTensor:
    """A local reshape where cuts fall on rows of both shapes; else shards move there."""
    return _shaped(x, _reshaped(x._spec, _laid(x), tuple(shape)), op)


@cached
def _viewed(shape: tuple[int, ...], stride: tuple[int, ...], target: tuple[int, ...]) -> Any:
    """The strides of a view."""
    with _torch.outside_modes():
        return torch.empty_strided(shape, stride, device="meta").view(target).stride()


def _laid(x: ShardTensor) -> Stride:
    """The strides of the whole, None for rows first."""
    if x._strides is None and (x._spec.thin or x._local.is_contiguous()):
        return None
    return layout.stride(x)


def _shaped(x: ShardTensor, plan: Reshaped, op: str, strict: bool = False) -> ShardTensor:
    stays, before, spec, local_shape, view, even = plan
    if strict and not view:
        raise RuntimeError(
            "view size is not compatible with input tensor's size and stride (at least one "
            "dimension spans across two contiguous subspaces). Use .reshape(...) instead."
        )
    if stays:
        out = x._local.reshape(local_shape)
        if view and out._base is not None:
            # a view of this shard, hence in its memory
            return wrap(out, spec)
        if even is not None:
            return like(wrap(out, spec), even)
        if not view and _torch.storage(out)._cdata == _torch.storage(x._local)._cdata:
            # a view of this shard, of one row perhaps, where the whole is copied
            out = out.clone(memory_format=torch.contiguous_format)
        return wrap(stands_for_view(out, x._local, op) if view else out, spec)
    if not view:
        y = like(x, Spec(spec.mesh, before, spec.partial))
        copy = wrap(y._local.reshape(local_shape), spec)
        return copy if even is None else like(copy, even)
    if not x._spec.shape.numel():
        return wrap(replicate(x)._local.reshape(local_shape), spec)
    out = wrap(moved(x, before, op)._local.reshape(local_shape), spec)
    if even is not None:
        out = like(out, even)
    stands_for_view(out._local, x._local, op)
    # what moved has no gaps
    return (
        out if _laid(x) is None else layout.told(out, _viewed(x.shape, layout.stride(x), out.shape))
    )


@function_rule("view")
def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    x = args[0]
    first = args[1] if len(args) > 1 else kwargs.get("dtype", kwargs.get("size"))
    if isinstance(first, torch.dtype):
        if first.itemsize != x.dtype.itemsize:
            return _other_items(x, first)
        # the bits of a sum are not the sums of bits
        y = reduced(x)
        stands_for_view(y._local, x._local, "view")
        return wrap(y._local.view(first), y._spec)
    # as a leaf of a composite the wrapper's strides were those of a contiguous tensor
    strict = not isinstance(func, _torch.OpOverload)
    plan = _reshaped(x._spec, _laid(x), many(first, args[2:]))
    return _shaped(x, plan, "view", strict)


def _other_items(x: ShardTensor, dtype: torch.dtype) -> ShardTensor:
    """The same memory in items of another size, of which the last dim has more or fewer."""
    if not x.ndim:
        raise RuntimeError(f"self.dim() cannot be 0 to view {x.dtype} as {dtype}")
    new, old = dtype.itemsize, x.dtype.itemsize
    last, own = x._spec.dims[-1], x._local
    ranges = {} if x._slice is None else x._slice[2]
    (begin, _), step = ranges.get(x.ndim - 1, ((0, 0), 1))
    if last.size * old % new or begin * old % new:
        raise RuntimeError(
            f"self.size(-1) and self.storage_offset() must be divisible by {new // old} to view "
            f"{x.dtype} as {dtype} (different element sizes), but got {last.size} and {begin}"
        )
    whole = on_multiples(last, max(1, new // old))
    spec = x._spec.replace({-1: whole}).cotangent
    y = convert(own, x._spec, spec)
    if new > old and last.axes:
        # rows, and the memory, of a shard may begin within an item
        y = y.clone(memory_format=torch.contiguous_format)
    stands_for_view(y, own, "view")
    out = spec.replace({-1: whole.scaled(old, new)})

    def run() -> Tensor:
        if step != 1 or (own.shape[-1] > 1 and own.numel() and own.stride(-1) != 1):
            raise RuntimeError(
                f"self.stride(-1) must be 1 to view {x.dtype} as {dtype} (different element sizes)"
            )
        if y.numel():
            return y.view(dtype)
        return y.as_strided((0,), (1,), 0).view(dtype).view(out.local_shape)

    # shards of one row tell nothing of strides
    what = f"view as {dtype} of {x.dtype}: the last dim is not dense on {{0}} other ranks"
    return wrap(agreed(run, out, out.varying, RuntimeError, what), out)


@rule("reshape", "_unsafe_view")
def reshape(input: ShardTensor, *shape: Any, **kwargs: Any) -> ShardTensor:
    first = shape[0] if shape else kwargs["shape"]
    return _reshape(input, many(first, shape[1:]), "reshape")


@rule("_reshape_alias")
def reshape_alias(input: ShardTensor, size: Sequence[int], stride: Sequence[int]) -> ShardTensor:
    return _reshape(input, size, "reshape")


@rule("view_as")
def view_as(input: Tensor, other: Tensor) -> Tensor:
    return input.view(other.shape)


@rule("reshape_as")
def reshape_as(input: Tensor, other: Tensor) -> Tensor:
    return input.reshape(other.shape)


@rule("flatten")
def flatten(input: ShardTensor, start_dim: int = 0, end_dim: int = -1) -> ShardTensor:
    plan = _flattened(input._spec, _laid(input), index(start_dim), index(end_dim))
    return input if plan is None else _shaped(input, plan, "flatten", False)


@cached
def _flattened(spec: Spec, stride: Stride, start_dim: int, end_dim: int) -> Reshaped | None:
    n = max(1, len(spec.dims))
    start, end = checked_dim(start_dim, n), checked_dim(end_dim, n)
    if start > end:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    if spec.dims and start == end:
        return None
    shape = list(spec.shape) or [1]
    shape[start : end + 1] = [prod(shape[start : end + 1])]
    return _reshaped(spec, stride, tuple(shape))


@rule("ravel")
def ravel(input: ShardTensor) -> ShardTensor:
    # torch copies what has gaps, even those that a view could have
    x: Any = input if _laid(input) is None else input.contiguous()
    return _reshape(x, [-1] if x.numel() else [0], "ravel")


@rule("unflatten")
def unflatten(input: ShardTensor, dim: int, sizes: Sequence[int]) -> ShardTensor:
    plan = _unflattened(input._spec, _laid(input), index(dim), many(sizes))
    return _shaped(input, plan, "unflatten", False)


@cached
def _unflattened(spec: Spec, stride: Stride, dim: int, sizes: tuple[int, ...]) -> Reshaped:
    d, shape = checked_dim(dim, len(spec.dims)), spec.shape
    return _reshaped(spec, stride, (*shape[:d], *_infer(sizes, shape[d]), *shape[d + 1 :]))
