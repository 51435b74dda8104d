"""Views: local views of the local tensor wherever the shards allow it.

reshape: input and output dims fall into blocks of equal products. A shard of a leading dim is a
contiguous part of the flattened block, so it survives any reshape of the block once its edges lie
on whole rows of the output. Shards of other dims of a block move to the leading dim first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from operator import index
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..cache import cached
from ..cuts import chunk_sizes
from ..dispatch.writes import stands_for_rows, stands_for_view
from ..registry import rule
from ..spec import Dim, Spec, axes_in, whole_dims
from ..tensor import ShardTensor, layout, wrap
from ..tensor.redistribute import convert, like, reduced, replicate, to_dims
from .agreed import agreed
from .pointwise import function_rule


def many(first: Any, rest: tuple[Any, ...] = ()) -> tuple[int, ...]:
    """The integers of f(1, 2), f((1, 2)), f(torch.Size([1, 2])) and f(1, torch.tensor(2))."""
    return tuple(map(index, first if isinstance(first, list | tuple) else (first, *rest)))


def moved(x: ShardTensor, dims: Sequence[Dim], op: str) -> ShardTensor:
    """x in other dims, for an op that is a view in torch; addends stay addends."""
    y = like(x, Spec(x._spec.mesh, tuple(dims), x._spec.partial))
    if y is not x:
        stands_for_view(y._local, x._local, op)
    return y


def whole_in(x: ShardTensor, dims: Sequence[int], op: str) -> ShardTensor:
    """x with some dims gathered."""
    if not any(x._spec.dims[d].axes for d in dims):
        return x
    whole = x._spec.whole_in(dims).dims
    if x._spec.partial:
        return moved(x, whole, op)
    y, spec = to_dims(x, whole), x._spec

    def write(base: Tensor, rows: Tensor) -> None:
        # whole on every rank: nothing is sent. x may have other dims by then (squeeze_, t_)
        base.copy_(convert(rows, y._spec, spec))

    stands_for_rows(y._local, x, op, write)
    return y


# reshape -----------------------------------------------------------------------------------------


def _infer(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    known = prod(n for n in shape if n != -1)
    if -1 in shape:
        if known == 0 or numel % known:
            raise RuntimeError(f"shape '{list(shape)}' is invalid for input of size {numel}")
        return tuple(numel // known if n == -1 else n for n in shape)
    if known != numel:
        raise RuntimeError(f"shape '{list(shape)}' is invalid for input of size {numel}")
    return tuple(shape)


def _blocks(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of runs of input and output dims with equal products; numel is not zero."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left = a[i] if i < len(a) else 1
        right = b[j] if j < len(b) else 1
        if i < len(a) and left == 1 and (right != 1 or j >= len(b)):
            found.append(([i], []))
            i += 1
            continue
        if j < len(b) and right == 1 and (left != 1 or i >= len(a)):
            found.append(([], [j]))
            j += 1
            continue
        ins, outs = [i], [j]
        while left != right:
            if left < right:
                i += 1
                ins.append(i)
                left *= a[i]
            else:
                j += 1
                outs.append(j)
                right *= b[j]
        i, j = i + 1, j + 1
        found.append((ins, outs))
    return found


def _lead(dims: Sequence[int], sizes: Sequence[int]) -> int:
    return next((d for d in dims if sizes[d] > 1), dims[0])


def _gathered_on_lead(spec: Spec, ins: Sequence[int], lead: int) -> Dim:
    """The leading dim of a block, sharded by all axes that shard any dim of the block."""
    dim = spec.dims[lead]
    axes = axes_in([spec.dims[d] for d in ins])
    if axes == dim.axes:
        return dim
    if dim.axes and axes[: len(dim.axes)] == dim.axes:
        # keep the outer cut, so that only the inner axes move
        inner = prod(spec.mesh.size(a) for a in axes[len(dim.axes) :])
        return Dim(dim.size, axes, tuple(s for n in dim.sizes for s in chunk_sizes(n, inner)))
    return Dim.chunked(dim.size, axes, spec.mesh)


def _on_multiples(dim: Dim, q: int) -> Dim:
    """The dim with its cuts moved to the nearest multiples of q."""
    if q == 1 or all(o % q == 0 for o in dim.offsets):
        return dim
    return dim.cut_at([*(min(dim.size, (o + q // 2) // q * q) for o in dim.offsets[:-1]), dim.size])


@cached
def _plan(spec: Spec, shape: tuple[int, ...]) -> tuple[tuple[Dim, ...], Spec]:
    """(the dims in which the local reshape is right, the spec of the result)."""
    a = spec.shape
    before = list(spec.dims)
    after = list(whole_dims(shape))
    for ins, outs in _blocks(a, shape):
        if not any(spec.dims[d].axes for d in ins):
            continue
        if not outs:
            before[ins[0]] = Dim(1)
            continue
        lead, out = _lead(ins, a), _lead(outs, shape)
        rows = prod(a[d] for d in ins if d > lead)
        per_row = prod(shape[d] for d in outs if d > out)
        dim = _gathered_on_lead(spec, ins, lead)
        dim = _on_multiples(dim, per_row // gcd(per_row, rows))
        for d in ins:
            before[d] = dim if d == lead else Dim(a[d])
        after[out] = dim.scaled(rows, per_row)
    return tuple(before), Spec(spec.mesh, tuple(after), spec.partial)


@cached
def _reshaped(
    spec: Spec, stride: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[bool, tuple[Dim, ...], Spec, bool]:
    """(whether shards stay, the dims that they need, the spec of the result, whether a view)."""
    target = _infer(shape, spec.shape.numel())
    before, out = _plan(spec, target)
    return before == spec.dims, before, out, layout.is_view(spec.shape, stride, target)


def _reshape(x: ShardTensor, shape: Sequence[int], op: str, strict: bool) -> ShardTensor:
    """A local reshape where cuts fall on rows of both shapes; else shards move there."""
    if not x._spec.shape.numel():
        target = _infer(shape, 0)
        local = replicate(x)._local.reshape(target)
        return wrap(local, Spec.whole(x._spec.mesh, target))
    stays, before, spec, view = _reshaped(x._spec, layout.stride(x), tuple(shape))
    if strict and not view:
        raise RuntimeError(
            "view size is not compatible with input tensor's size and stride (at least one "
            "dimension spans across two contiguous subspaces). Use .reshape(...) instead."
        )
    if stays:
        out = x._local.reshape(spec.local_shape)
        if not view and out.untyped_storage()._cdata == x._local.untyped_storage()._cdata:
            # a view of this shard, of one row perhaps, where the whole is copied
            out = out.clone(memory_format=torch.contiguous_format)
        return wrap(stands_for_view(out, x._local, op) if view else out, spec)
    if not view:
        y = like(x, Spec(spec.mesh, before, spec.partial))
        return wrap(y._local.reshape(spec.local_shape), spec)
    out = moved(x, before, op)._local.reshape(spec.local_shape)
    return wrap(stands_for_view(out, x._local, op), spec)


@function_rule("view")
def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    x, *shape = args
    if not shape:
        shape = [kwargs.get("dtype", kwargs.get("size"))]
    if isinstance(shape[0], torch.dtype):
        if shape[0].itemsize != x.dtype.itemsize:
            return _other_items(x, shape[0])
        # the bits of a sum are not the sums of bits
        y = reduced(x)
        stands_for_view(y._local, x._local, "view")
        return wrap(y._local.view(shape[0]), y._spec)
    # as a leaf of a composite the wrapper's strides were those of a contiguous tensor
    leaf = isinstance(func, _torch.OpOverload)
    return _reshape(x, many(shape[0], tuple(shape[1:])), "view", not leaf)


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
    whole = _on_multiples(last, max(1, new // old))
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
    return _reshape(input, many(first, shape[1:]), "reshape", False)


@rule("_reshape_alias")
def reshape_alias(input: ShardTensor, size: Sequence[int], stride: Sequence[int]) -> ShardTensor:
    return _reshape(input, size, "reshape", False)


@rule("view_as", "reshape_as")
def view_as(input: Tensor, other: Tensor) -> Tensor:
    return input.reshape(other.shape)


@rule("flatten")
def flatten(input: ShardTensor, start_dim: int = 0, end_dim: int = -1) -> ShardTensor:
    n = max(1, input.ndim)
    start, end = _index(start_dim, n), _index(end_dim, n)
    if start > end:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    shape = list(input.shape) or [1]
    shape[start : end + 1] = [prod(shape[start : end + 1])]
    return input if input.ndim and start == end else _reshape(input, shape, "flatten", False)


@rule("ravel")
def ravel(input: ShardTensor) -> ShardTensor:
    return _reshape(input, [-1] if input.numel() else [0], "ravel", False)


@rule("unflatten")
def unflatten(input: ShardTensor, dim: int, sizes: Sequence[int]) -> ShardTensor:
    d = _index(dim, input.ndim)
    inner = _infer(many(sizes), input.shape[d])
    return _reshape(input, (*input.shape[:d], *inner, *input.shape[d + 1 :]), "unflatten", False)


def _index(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise IndexError(f"Dimension out of range (expected to be in [{-ndim}, {ndim - 1}])")
    return dim % ndim


# order of dims -----------------------------------------------------------------------------------


def _permuted(x: ShardTensor, order: Sequence[int]) -> ShardTensor:
    order = tuple(order)
    return wrap(x._local.permute(order), _ordered(x._spec, order))


@cached
def _ordered(spec: Spec, order: tuple[int, ...]) -> Spec:
    return Spec(spec.mesh, tuple([spec.dims[d] for d in order]), spec.partial)


@rule("permute")
def permute(input: ShardTensor, *dims: Any, **kwargs: Any) -> ShardTensor:
    first = dims[0] if dims else kwargs["dims"]
    order = [_index(d, input.ndim) for d in many(first, dims[1:])]
    if sorted(order) != list(range(input.ndim)):
        raise RuntimeError(f"permute(dims): {order} for a tensor of {input.ndim} dims")
    return _permuted(input, order)


@rule("transpose", "swapaxes", "swapdims")
def transpose(input: ShardTensor, dim0: int, dim1: int) -> ShardTensor:
    return wrap(input._local.transpose(dim0, dim1), _swapped(input._spec, dim0, dim1))


@cached
def _swapped(spec: Spec, dim0: int, dim1: int) -> Spec:
    order = list(range(len(spec.dims)))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return _ordered(spec, tuple(order))


@rule("t")
def t(input: ShardTensor) -> ShardTensor:
    if input.ndim > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {input.ndim}D")
    return reverse_dims(input)


@rule("T", "numpy_T")
def reverse_dims(input: ShardTensor) -> ShardTensor:
    return _permuted(input, range(input.ndim)[::-1])


@rule("mT")
def matrix_transpose(input: ShardTensor) -> ShardTensor:
    return transpose(input, -2, -1)


@rule("H", "mH", "adjoint")
def adjoint(input: ShardTensor) -> Tensor:
    y = transpose(input, -2, -1)
    return y.conj() if y.is_complex() else y


@rule("movedim", "moveaxis")
def movedim(input: ShardTensor, source: Any, destination: Any) -> ShardTensor:
    n = input.ndim
    old = [_index(d, max(1, n)) for d in many(source)]
    new = [_index(d, max(1, n)) for d in many(destination)]
    rest = iter([d for d in range(n) if d not in old])
    place = dict(zip(new, old, strict=True))
    return _permuted(input, [place[d] if d in place else next(rest) for d in range(n)])


# dims of size one --------------------------------------------------------------------------------


@rule("squeeze")
def squeeze(input: ShardTensor, dim: Any = None) -> ShardTensor:
    n = input.ndim
    chosen = range(n) if dim is None else [_index(d, n) for d in many(dim) if n]
    gone = [d for d in chosen if input.shape[d] == 1]
    x = whole_in(input, gone, "squeeze")
    return wrap(x._local.squeeze(tuple(gone)), x._spec.drop(gone))


@rule("unsqueeze")
def unsqueeze(input: ShardTensor, dim: int) -> ShardTensor:
    d = _index(dim, input.ndim + 1)
    return wrap(input._local.unsqueeze(d), _with_one(input._spec, d))


@cached
def _with_one(spec: Spec, d: int) -> Spec:
    return spec.insert(d, Dim(1))


@rule("expand", "broadcast_to")
def expand(input: ShardTensor, *size: Any, implicit: bool = False, **kwargs: Any) -> ShardTensor:
    first = size[0] if size else kwargs.get("size", kwargs.get("shape"))
    shape = many(first, size[1:])
    lead = len(shape) - input.ndim
    if lead < 0:
        raise RuntimeError(f"expand: {list(shape)} has fewer dims than {list(input.shape)}")
    grown = [d for d in range(input.ndim) if shape[lead + d] not in (-1, input.shape[d])]
    for d in grown:
        if input.shape[d] != 1:
            raise RuntimeError(f"The expanded size {shape[lead + d]} must match {input.shape[d]}")
    x = whole_in(input, grown, "expand")
    spec = x._spec.replace({d: Dim(shape[lead + d]) for d in grown})
    spec = Spec(spec.mesh, (*whole_dims(shape[:lead]), *spec.dims), spec.partial)
    return wrap(x._local.expand(spec.local_shape), spec)


@rule("expand_as")
def expand_as(input: Tensor, other: Tensor) -> Tensor:
    return input.expand(other.shape)
