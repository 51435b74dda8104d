"""Reductions over dims: a local reduction, then one all-reduce where a sharded dim is reduced.

Reductions that are no sums (products, norms) gather one partial result from each rank instead and
reduce those, so that their gradients are torch's own, at zeros too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..errors import UnsupportedOpError
from ..redistribute import reduced
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap

Dims = int | Sequence[int] | None


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


def without(spec: Spec, dims: Sequence[int], keepdim: bool) -> Spec:
    """The spec after a reduction over dims, which leaves its result alike along their mesh axes."""
    kept = [Dim(1) if i in dims else d for i, d in enumerate(spec.dims) if keepdim or i not in dims]
    return spec.with_dims(kept)


def axes_of(spec: Spec, dims: Sequence[int]) -> tuple[int, ...]:
    """The mesh axes that shard any of the dims, ascending."""
    return tuple(sorted(a for d in dims for a in spec.dims[d].axes))


def finish(local: Tensor, spec: Spec, dims: Sequence[int], op: str = "sum") -> Tensor:
    """The reduction over ranks of what each rank got over its part of dims."""
    axes = axes_of(spec, dims)
    return comm.reduce(local, comm.group(spec.mesh, axes), op) if axes else local


def stacked(local: Tensor, spec: Spec, dims: Sequence[int]) -> Tensor:
    """What every rank got over its part of dims, along a new first dim, the same on each rank."""
    group = comm.group(spec.mesh, axes_of(spec, dims))
    return comm.gather(local.unsqueeze(0), 0, [1] * comm.size(group), group)


@rule("sum")
def sum(
    input: ShardTensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> ShardTensor:
    x = reduced(input)
    dims = over(dim, x.ndim)
    local = (
        torch.sum(x._local, dims, keepdim=keepdim, dtype=dtype)
        if x.ndim
        else x._local.sum(dtype=dtype)
    )
    return wrap(finish(local, x._spec, dims), without(x._spec, dims, keepdim))


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
    dims = over(dim, input.ndim)
    if not axes_of(input._spec, dims):
        x = reduced(input)
        local = x._local.mean(dims or None, keepdim, dtype=dtype)
        return wrap(local, without(x._spec, dims, keepdim))
    out = dtype or input.dtype
    if not (out.is_floating_point or out.is_complex):
        raise RuntimeError(f"mean(): could not infer output dtype from {input.dtype}")
    # a mean of halves is summed in single precision, as torch does
    wide = torch.float32 if out in (torch.float16, torch.bfloat16) else out
    total = sum(input, dims, keepdim, dtype=wide)
    return wrap((total._local / count(input, dims)).to(out), total._spec)


@rule("nansum")
def nansum(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return torch.where(input.isnan(), 0, input).sum(over(dim, input.ndim), keepdim, dtype=dtype)


@rule("prod")
def prod(
    input: ShardTensor, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None
) -> ShardTensor:
    x = reduced(input)
    dims = over(dim, x.ndim)
    where = () if dim is None else (dim, keepdim)
    local = x._local.prod(*where, dtype=dtype)
    if axes_of(x._spec, dims):
        local = stacked(local, x._spec, dims).prod(0)
    return wrap(local, without(x._spec, dims, keepdim and dim is not None))


@rule("all")
def all(input: ShardTensor, dim: Dims = None, keepdim: bool = False) -> ShardTensor:
    return _logical(torch.all, input, dim, keepdim, "min")


@rule("any")
def any(input: ShardTensor, dim: Dims = None, keepdim: bool = False) -> ShardTensor:
    return _logical(torch.any, input, dim, keepdim, "max")


def _logical(fn: Any, input: ShardTensor, dim: Dims, keepdim: bool, op: str) -> ShardTensor:
    x = reduced(input)
    dims = over(dim, x.ndim)
    local = fn(x._local, dims, keepdim) if dims else fn(x._local)
    return wrap(finish(local, x._spec, dims, op), without(x._spec, dims, keepdim))


@rule("count_nonzero")
def count_nonzero(input: Tensor, dim: Dims = None) -> Tensor:
    return (input != 0).sum(over(dim, input.ndim))


# moments -----------------------------------------------------------------------------------------


def _correction(dim: Any, unbiased: bool | None, correction: float | None) -> tuple[Dims, float]:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None or unbiased else 0
    return dim, correction


def _moments(
    input: ShardTensor, dim: Dims, correction: float, keepdim: bool
) -> tuple[Tensor, Tensor]:
    """(variance, mean), in two passes: the mean of all ranks first."""
    dims = over(dim, input.ndim)
    if not axes_of(input._spec, dims):
        x = reduced(input)
        found = torch.var_mean(x._local, dims, correction=correction, keepdim=keepdim)
        spec = without(x._spec, dims, keepdim)
        return wrap(found[0], spec), wrap(found[1], spec)
    m = input.mean(dims, keepdim=True)
    d = input - m
    square = (d * d.conj()).real if d.is_complex() else d * d
    n = max(0.0, count(input, dims) - correction)
    v = square.sum(dims, keepdim=keepdim)
    v = v / n if n else v * float("nan") if not count(input, dims) else v / 0.0
    return v, m if keepdim else m.squeeze(dims)


def _root(v: Tensor) -> Tensor:
    """The square root, whose gradient at zero is zero as in torch.std."""
    zero = v == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())


@rule("var")
def var(
    input: ShardTensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> Tensor:  # fmt: skip
    return _moments(input, *_correction(dim, unbiased, correction), keepdim)[0]


@rule("std")
def std(
    input: ShardTensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> Tensor:  # fmt: skip
    return _root(var(input, dim, unbiased, keepdim, correction=correction))


@rule("var_mean")
def var_mean(
    input: ShardTensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _moments(input, *_correction(dim, unbiased, correction), keepdim)


@rule("std_mean")
def std_mean(
    input: ShardTensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    v, m = _moments(input, *_correction(dim, unbiased, correction), keepdim)
    return _root(v), m


# norms -------------------------------------------------------------------------------------------


@rule("linalg_vector_norm")
def vector_norm(
    input: Tensor, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The norm of the norms of the shards; for infinite orders the largest or smallest value."""
    x = input if dtype is None else input.to(dtype)
    assert isinstance(x, ShardTensor)
    dims = over(dim, x.ndim)
    if abs(ord) == float("inf") and axes_of(x._spec, dims):
        size = x.abs()
        return size.amax(dims, keepdim) if ord > 0 else size.amin(dims, keepdim)
    x = reduced(x)
    local = torch.linalg.vector_norm(x._local, ord, dims or None, keepdim)
    if axes_of(x._spec, dims):
        # how many are not zero adds up; other orders are norms of norms
        local = torch.linalg.vector_norm(stacked(local, x._spec, dims), 1 if ord == 0 else ord, 0)
    return wrap(local, without(x._spec, dims, keepdim))


@rule("norm")
def norm(
    input: Tensor, p: Any = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    """The builtin below torch.norm: vector norms, of which the Frobenius norm is one."""
    if p == "nuc":
        raise UnsupportedOpError(f"the nuclear norm of {getattr(input, '_spec', input.shape)}")
    order = 2 if p is None or p == "fro" else p
    return torch.linalg.vector_norm(input, order, dim, keepdim, dtype=dtype)


@rule("logsumexp", "special_logsumexp")
def logsumexp(input: ShardTensor, dim: Dims, keepdim: bool = False) -> Tensor:
    dims = over(dim, input.ndim)
    x = input if input.is_floating_point() or input.is_complex() else input.float()
    assert isinstance(x, ShardTensor)
    if not axes_of(x._spec, dims):
        x = reduced(x)
        local = torch.logsumexp(x._local, dims, keepdim) if x.ndim else x._local
        return wrap(local, without(x._spec, dims, keepdim))
    most = x.detach().amax(dims, keepdim=True)
    most = torch.where(most.isinf(), 0.0, most)
    total = (x - most).exp().sum(dims, keepdim=True).log() + most
    return total if keepdim else total.squeeze(dims)
