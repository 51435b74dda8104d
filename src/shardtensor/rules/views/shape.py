"""Views that order, drop, add and expand dims: each a local view, its spec found once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...cache import cached
from ...registry import rule
from ...spec import Dim, Spec, whole_dims
from ...tensor import ShardTensor, wrap
from ..operands import checked_dim, many, whole_in

# order of dims -----------------------------------------------------------------------------------


# (the order of dims, the spec of the result)
Order = tuple[tuple[int, ...], Spec]


def permuted(x: ShardTensor, order: Sequence[int]) -> ShardTensor:
    order, spec = _order(x._spec, tuple(order))
    return wrap(x._local.permute(order), spec)


@cached
def _order(spec: Spec, dims: tuple[int, ...]) -> Order:
    n = len(spec.dims)
    order = tuple([checked_dim(d, n) for d in dims])
    if sorted(order) != list(range(n)):
        raise RuntimeError(f"permute(dims): {list(order)} for a tensor of {n} dims")
    return order, Spec(spec.mesh, tuple([spec.dims[d] for d in order]), spec.partial)


@rule("permute")
def permute(input: ShardTensor, *dims: Any, **kwargs: Any) -> ShardTensor:
    order, spec = _order(input._spec, many(dims[0] if dims else kwargs["dims"], dims[1:]))
    return wrap(input._local.permute(order), spec)


@rule("transpose", "swapdims")
def transpose(input: ShardTensor, dim0: int, dim1: int) -> ShardTensor:
    return wrap(input._local.transpose(dim0, dim1), _swapped(input._spec, dim0, dim1))


@rule("swapaxes")
def swapaxes(input: ShardTensor, axis0: int, axis1: int) -> ShardTensor:
    return transpose(input, axis0, axis1)


@cached
def _swapped(spec: Spec, dim0: int, dim1: int) -> Spec:
    order = list(range(len(spec.dims)))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return _order(spec, tuple(order))[1]


@rule("t")
def t(input: ShardTensor) -> ShardTensor:
    n = len(input._spec.dims)
    if n > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {n}D")
    return reverse_dims(input)


@rule("T", "numpy_T")
def reverse_dims(input: ShardTensor) -> ShardTensor:
    order, spec = _reversed(input._spec)
    return wrap(input._local.permute(order), spec)


@cached
def _reversed(spec: Spec) -> Order:
    return _order(spec, tuple(range(len(spec.dims))[::-1]))


@rule("mT")
def matrix_transpose(input: ShardTensor) -> ShardTensor:
    # torch takes a number for its own transpose, as of mH
    if not input.ndim:
        return input
    return wrap(input._local.transpose(-2, -1), _swapped(input._spec, -2, -1))


@rule("H")
def conjugate_transpose(input: ShardTensor) -> Tensor:
    if input.ndim not in (0, 2):
        raise RuntimeError(
            f"tensor.H is only supported on matrices (2-D tensors). Got {input.ndim}-D tensor: mH "
            "takes batches of matrices"
        )
    return adjoint(input)


@rule("mH", "adjoint")
def adjoint(input: ShardTensor) -> Tensor:
    y = transpose(input, -2, -1) if input.ndim else input
    return y.conj() if y.is_complex() else y


@rule("movedim", "moveaxis")
def movedim(input: ShardTensor, source: Any, destination: Any) -> ShardTensor:
    order, spec = _moved(input._spec, many(source), many(destination))
    return wrap(input._local.permute(order), spec)


@cached
def _moved(spec: Spec, source: tuple[int, ...], destination: tuple[int, ...]) -> Order:
    n = len(spec.dims)
    old = [checked_dim(d, max(1, n)) for d in source]
    new = [checked_dim(d, max(1, n)) for d in destination]
    if len(old) != len(new):
        raise RuntimeError(f"movedim: {len(old)} dims to {len(new)} places")
    for name, dims in (("source", old), ("destination", new)):
        if len(set(dims)) != len(dims):
            raise RuntimeError(f"movedim: repeated dim in `{name}` ({dims})")
    rest = iter([d for d in range(n) if d not in old])
    place = dict(zip(new, old, strict=True))
    return _order(spec, tuple([place[d] if d in place else next(rest) for d in range(n)]))


# dims of size one --------------------------------------------------------------------------------


@rule("squeeze")
def squeeze(input: ShardTensor, dim: Any = None) -> ShardTensor:
    spec = input._spec
    gone, out, cut = _squeezed(spec, None if dim is None else many(dim))
    if cut:
        input = whole_in(input, gone, "squeeze", True)
        out = input._spec.drop(gone)
    return wrap(input._local.squeeze(gone), out)


@cached
def _squeezed(spec: Spec, dims: tuple[int, ...] | None) -> tuple[tuple[int, ...], Spec, bool]:
    """(the dims that go, the spec of the result, whether mesh axes shard one of them)."""
    n = len(spec.dims)
    chosen = range(n) if dims is None else [checked_dim(d, max(n, 1)) for d in dims]
    for d in set(chosen):
        if chosen.count(d) > 1:
            raise RuntimeError(f"dim {d} appears multiple times in the list of dims")
    chosen = chosen if n else []
    gone = tuple([d for d in chosen if spec.shape[d] == 1])
    cut = any(spec.dims[d].axes for d in gone)
    return gone, spec.drop(gone) if gone else spec, cut


@rule("unsqueeze")
def unsqueeze(input: ShardTensor, dim: int) -> ShardTensor:
    return wrap(input._local.unsqueeze(dim), _with_one(input._spec, dim))


@cached
def _with_one(spec: Spec, dim: int) -> Spec:
    return spec.insert(checked_dim(dim, len(spec.dims) + 1), Dim(1))


@rule("expand", "broadcast_to")
def expand(input: ShardTensor, *size: Any, implicit: bool = False, **kwargs: Any) -> ShardTensor:
    first = size[0] if size else kwargs.get("size", kwargs.get("shape"))
    grown, spec, local_shape = _expanded(input._spec, many(first, size[1:]))
    local = whole_in(input, grown, "expand")._local if grown else input._local
    return wrap(local.expand(local_shape), spec)


@cached
def _expanded(spec: Spec, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Spec, torch.Size]:
    """(the dims that grow and are cut, the spec of the result, its local shape)."""
    own = spec.shape
    lead = len(shape) - len(own)
    if lead < 0:
        raise RuntimeError(f"expand: {list(shape)} has fewer dims than {list(own)}")
    dims = list(spec.dims)
    for d, n in enumerate(shape[lead:]):
        if n not in (-1, own[d]):
            if own[d] != 1:
                raise RuntimeError(f"The expanded size {n} must match {own[d]}")
            dims[d] = Dim(n)
    cut = tuple([d for d, dim in enumerate(dims) if spec.dims[d].axes and not dim.axes])
    out = Spec(spec.mesh, (*whole_dims(shape[:lead]), *dims), spec.partial)
    return cut, out, out.local_shape


@rule("expand_as")
def expand_as(input: Tensor, other: Tensor) -> Tensor:
    return input.expand(other.shape)
