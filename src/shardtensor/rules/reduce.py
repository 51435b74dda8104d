"""Reductions over dims: a local reduction, then one all-reduce where a sharded dim is reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import comm
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
            raise IndexError(f"dim {d} out of range for a tensor of {ndim} dims")
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


@rule("mean")
def mean(
    input: ShardTensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> ShardTensor:
    dims = over(dim, input.ndim)
    n = 1
    for d in dims:
        n *= input.shape[d]
    if not axes_of(input._spec, dims):
        x = reduced(input)
        local = torch.mean(x._local, dims, keepdim=keepdim, dtype=dtype) if dims else x._local
        return wrap(local, without(x._spec, dims, keepdim))
    total = sum(input, dims, keepdim, dtype=dtype)
    return wrap(total._local / n, total._spec)
