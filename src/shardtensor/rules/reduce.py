"""Reductions over dims: a local reduction, then one all-reduce where a sharded dim is reduced.

Reductions that are no sums (products, norms, log-sum-exp) gather one partial result from each rank
instead and reduce those, so that their gradients are torch's own, at zeros and infinities too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from ..dispatch.trial import tried
from ..registry import rule
from ..spec import Dim, Spec, axes_in
from ..tensor import ShardTensor, wrap
from ..tensor.recut import apart
from ..tensor.redistribute import reduced
from .empty import through, with_one
from .operands import many

Dims = int | Sequence[int] | None
_HALVES = (torch.float16, torch.bfloat16)
_OWN = (*_HALVES, torch.float32, torch.float64)


def over(dim: Dims, ndim: int) -> tuple[int, ...]:
    """The dims, non-negative and ascending; all of them for None or an empty list."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return tuple(range(ndim))
    found = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in found:
        if not -max(ndim, 1) <= d < max(ndim, 1):
            raise IndexError(f"Dimension out of range: {d} for a tensor of {ndim} dims")
    if len({d % max(ndim, 1) for d in found}) != len(found):
        raise RuntimeError(f"dim {found} appears multiple times in the list of dims")
    return tuple(sorted({d % ndim for d in found if ndim}))


class Over(NamedTuple):
    """A reduction over some dims, as torch names them.

    spec: of the result. group: of the ranks that share the dims out, None where each has them
    whole. numel: elements of each result.
    """

    dims: tuple[int, ...]
    spec: Spec
    group: str | None
    numel: int


@cached
def _over(spec: Spec, dim: int | tuple[int, ...] | None, keepdim: bool) -> Over:
    dims = over(dim, len(spec.dims))
    axes = _axes_of(spec, dims)
    group = comm.group(spec.mesh, axes) if axes else None
    n = 1
    for d in dims:
        n *= spec.shape[d]
    return Over(dims, _without(spec, dims, keepdim), group, n)


def _given(dim: Dims) -> int | tuple[int, ...] | None:
    """The dims in a form to be found by."""
    return dim if dim is None or type(dim) is int else many(dim)


def without(spec: Spec, dims: Sequence[int], keepdim: bool) -> Spec:
    """The spec after a reduction over dims, which leaves its result alike along their mesh axes."""
    return _without(spec, tuple(dims), keepdim)


@cached
def _without(spec: Spec, dims: tuple[int, ...], keepdim: bool) -> Spec:
    return (spec.replace(dict.fromkeys(dims, Dim(1))) if keepdim else spec.drop(dims)).cotangent


def axes_of(spec: Spec, dims: Sequence[int]) -> tuple[int, ...]:
    """The mesh axes that cut any of the dims into several shards, ascending."""
    return _axes_of(spec, tuple(dims))


@cached
def _axes_of(spec: Spec, dims: tuple[int, ...]) -> tuple[int, ...]:
    return axes_in([spec.dims[d] for d in dims if spec.dims[d].is_cut])


def finish(local: Tensor, spec: Spec, dims: Sequence[int], op: str = "sum") -> Tensor:
    """The reduction over ranks of what each rank got over its part of dims."""
    axes = axes_of(spec, dims)
    return comm.reduce(local, comm.group(spec.mesh, axes), op) if axes else local


def stacked(local: Tensor, spec: Spec, dims: Sequence[int]) -> Tensor:
    """What every rank got over its part of dims, along a new first dim, the same on each rank."""
    group = comm.group(spec.mesh, axes_of(spec, dims))
    return comm.gather(local.unsqueeze(0), 0, [1] * comm.size(group), group)


def with_elements(spec: Spec, dims: Sequence[int]) -> list[int]:
    """Which rows of what is `stacked` come from ranks with elements along all of dims."""
    return list(_with_elements(spec, tuple(dims)))


@cached
def _with_elements(spec: Spec, dims: tuple[int, ...]) -> tuple[int, ...]:
    places = spec.places(_axes_of(spec, dims))
    shapes = [spec.local_shape_at(at) for at in places]
    return tuple(i for i, shape in enumerate(shapes) if 0 not in [shape[d] for d in dims])


@rule("sum")
def sum(
    input: ShardTensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> ShardTensor:
    x = reduced(input) if input._spec.partial else input
    dims, spec, group, _ = _over(x._spec, _given(dim), keepdim)
    local = x._local
    if group is None:
        return wrap(torch.sum(local, dims, keepdim, dtype=dtype), spec)
    y = apart(x, dims)
    if y is not x:
        return sum(y, dims, keepdim, dtype=dtype)
    if (dtype or local.dtype) not in _HALVES:
        return wrap(comm.reduce(torch.sum(local, dims, keepdim, dtype=dtype), group), spec)
    # single precision under autocast
    out = torch.sum(local.new_empty(0), dtype=dtype).dtype
    total = torch.sum(local, dims, keepdim, dtype=torch.float32)
    return wrap(comm.reduce(total, group).to(out), spec)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch, too, adds up: single precision for halves."""
    return torch.float32 if dtype in _HALVES else dtype


def given(fn: Any, x: Tensor, dtype: Any = None) -> torch.dtype:
    """The dtype of fn along a dim of x, under autocast too, or what fn raises.

    Of most numbers it is theirs, which nothing has to be launched to know.
    """
    if dtype is None and x.dtype in _OWN and not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    asked = {} if dtype is None else {"dtype": dtype}
    found: torch.dtype = fn(x.new_zeros(1), 0, **asked).dtype
    return found


def count(x: Tensor, dims: Sequence[int]) -> int:
    """How many elements each result of a reduction over dims is made of."""
    n = 1
    for d in dims:
        n *= x.shape[d]
    return n


@rule("mean")
def mean(
    input: ShardTensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> ShardTensor:
    x = reduced(input) if input._spec.partial else input
    dims, spec, group, n = _over(x._spec, _given(dim), keepdim)
    if group is None:
        return wrap(x._local.mean(dims or None, keepdim, dtype=dtype), spec)
    out = dtype or x.dtype
    if not (out.is_floating_point or out.is_complex):
        raise RuntimeError(f"mean(): could not infer output dtype from {x.dtype}")
    y = apart(x, dims)
    if y is not x:
        return mean(y, dims, keepdim, dtype=dtype)
    local = x._local
    added = torch.float32 if out in _HALVES else out
    total = comm.reduce(torch.sum(local, dims, keepdim, dtype=added), group)
    return wrap((total / n).to(out), spec)


@rule("nansum")
def nansum(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    # torch has kernels for few dtypes, and says so here
    tried(torch.nansum, input, dtype=dtype)
    # a slope of zero times what comes, as in torch: a gradient that is NaN stays so
    kept = torch.where(input.isnan(), input.nan_to_num(0.0, 0.0, 0.0), input)
    return kept.sum(over(dim, input.ndim), keepdim, dtype=dtype)


@rule("prod")
def prod(
    input: ShardTensor, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None
) -> ShardTensor:
    dims = over(dim, input.ndim)
    x = apart(reduced(input), dims)
    where = () if dim is None else (dim, keepdim)
    if not axes_of(x._spec, dims):
        local = x._local.prod(*where, dtype=dtype)
    else:
        out = given(torch.prod, x._local, dtype)
        part = with_one(x._local, dims, 1)
        local = part.prod(*where, dtype=wide(out))
        if dim is None:
            local = through(local.reshape(1), part.reshape(-1), 0).reshape(local.shape)
        else:
            row = local if keepdim else local.unsqueeze(dims[0])
            row = through(row, part, dims[0])
            local = row if keepdim else row.squeeze(dims[0])
        local = _product(stacked(local, x._spec, dims)).to(out)
    return wrap(local, without(x._spec, dims, keepdim and dim is not None))


def _product(parts: Tensor) -> Tensor:
    """As prod(0), whose slope, a quotient, would be NaN beside infinity and wait for a GPU.

    Of neighbours first: numbers that alternate between large and small stay in range.
    """
    while len(parts) > 1:
        pairs = parts[:-1:2] * parts[1::2]
        parts = torch.cat([pairs, parts[-1:]]) if len(parts) % 2 else pairs
    return parts[0]


@rule("all")
def all(input: ShardTensor, dim: Dims = None, keepdim: bool = False) -> ShardTensor:
    return _logical(torch.all, input, dim, keepdim, "min")


@rule("any")
def any(input: ShardTensor, dim: Dims = None, keepdim: bool = False) -> ShardTensor:
    return _logical(torch.any, input, dim, keepdim, "max")


def _logical(fn: Any, input: ShardTensor, dim: Dims, keepdim: bool, op: str) -> ShardTensor:
    # an empty list of dims reduces nothing here, unlike in sums
    dims = () if dim is not None and dim == () else over(dim, input.ndim)
    x = apart(reduced(input), dims)
    local = fn(x._local, dims, keepdim)
    return wrap(finish(local, x._spec, dims, op), without(x._spec, dims, keepdim))


@rule("allclose")
def allclose(
    input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> bool:
    return bool(torch.isclose(input, other, rtol, atol, equal_nan).all())


@rule("count_nonzero")
def count_nonzero(input: Tensor, dim: Dims = None) -> Tensor:
    return (input != 0).sum(over(dim, input.ndim))


@rule("logsumexp", "special_logsumexp")
def logsumexp(input: ShardTensor, dim: Dims, keepdim: bool = False) -> Tensor:
    """From each rank's largest score and sum of powers beside it, in one message."""
    dims = over(dim, input.ndim)
    real = input.is_floating_point() or input.is_complex()
    x = apart(reduced(input if real else input.float()), dims)  # type: ignore[arg-type]
    if axes_of(x._spec, dims) and not x.dtype.is_complex:
        # halves are rounded once, as on one device
        part = x._local.to(wide(x.dtype))
        most = with_one(part.detach(), dims, float("-inf")).amax(dims, True)
        total = _beside(part, most).exp().sum(dims, True)
        both = stacked(torch.stack((most, total)), x._spec, dims)
        mosts, totals = both[:, 0].detach(), both[:, 1]
        most = mosts.amax(0)
        factor = _beside(mosts, most).exp()
        local = ((totals * factor).sum(0).log() + _finite(most)).to(x.dtype)
        local = local if keepdim else local.squeeze(dims)
    elif axes_of(x._spec, dims):
        local = torch.logsumexp(x._local, dims, keepdim)
        local = stacked(local, x._spec, dims).logsumexp(0)
    else:
        local = torch.logsumexp(x._local, dims, keepdim)
    return wrap(local, without(x._spec, dims, keepdim))


def _beside(scores: Tensor, most: Tensor) -> Tensor:
    """Scores relative to the largest; where that is inf, others have no weight and no gradient."""
    least = (most == float("inf")) & (scores != float("inf"))
    return (scores - _finite(most)).masked_fill(least, float("-inf"))


def _finite(most: Tensor) -> Tensor:
    """What scores are taken relative to: as in torch the largest, 0 where that is infinite."""
    return most.masked_fill(most.isinf(), 0.0)
