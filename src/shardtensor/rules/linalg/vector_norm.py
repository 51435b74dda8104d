"""Norms of vectors: sums of powers, largest and smallest sizes, over shards."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ...dispatch.trial import tried
from ...errors import UnsupportedOpError
from ...registry import rule
from ...tensor import ShardTensor, wrap
from ...tensor.recut import apart
from ...tensor.redistribute import reduced
from ..empty import with_one
from ..ordering.extrema import best_of
from ..reduce import Dims, axes_of, finish, over, stacked, wide, with_elements, without


@rule("linalg_vector_norm")
def vector_norm(
    input: Tensor, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The norm of each rank's part, then of these norms."""
    if dtype is not None or ((ord < 0 or ord == inf) and not input.numel()):
        # torch says which it takes, and of which order nothing has no norm
        tried(torch.linalg.vector_norm, input, ord, dim, dtype=dtype)
    if dtype is not None:
        input = input.to(dtype)
    if 60000 < abs(ord) < inf and all(input.shape[d] == 1 for d in over(dim, input.ndim)):
        # the size of one number, which its power would overflow
        ord = 1
    dims = over(dim, input.ndim)
    x = apart(reduced(input), dims)  # type: ignore[arg-type]
    spec = without(x._spec, dims, keepdim)
    if not axes_of(x._spec, dims):
        out = torch.linalg.vector_norm(x._local, ord, dim, keepdim)
    elif ord != ord:
        raise UnsupportedOpError(
            f"a norm of order {ord} on {x._spec}: what torch gives is undefined"
        )
    elif abs(ord) == inf:
        out = _extreme(x, ord, dims, keepdim)
    elif ord and _torch.differentiated(x):
        out = _root_of_sum(x, ord, dims, keepdim)
    else:
        out = _norm_of_norms(x, ord, dims, keepdim)
    return wrap(out, spec)


def _extreme(x: ShardTensor, ord: float, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """The largest or smallest size; as in torch, NaNs tie with each other."""
    local = with_one(x._local, dims, 0.0 if ord > 0 else inf)
    best = torch.linalg.vector_norm(local, ord, dims, True)
    size, limit = x._local.detach().abs(), best.detach()
    ties = ((size == limit) | (size.isnan() & limit.isnan())).sum(dims, keepdim)
    best = best if keepdim else best.squeeze(dims)
    return best_of(best, ties, x._spec, dims, torch.amax if ord > 0 else torch.amin)


def _norm_of_norms(x: ShardTensor, ord: float, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    # a norm of a negative order needs an element
    local = with_one(x._local, dims, 1.0) if ord < 0 else x._local
    out = torch.linalg.vector_norm(local, ord, dims, keepdim, dtype=wide(x.dtype))
    parts = stacked(out, x._spec, dims)
    held = with_elements(x._spec, dims)
    if ord < 0 and len(held) < len(parts):
        parts = parts[held]
    # how many are not zero adds up
    return torch.linalg.vector_norm(parts, ord or 1, 0).to(x.dtype.to_real())


def _root_of_sum(x: ShardTensor, ord: float, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """As a norm of norms has no second derivative where a rank's part is zero or empty.

    Zeros have no slope, and the second derivative that they have in torch.
    """
    local = x._local.to(wide(x.dtype))
    zero = local == 0 if ord < 3 and ord not in (1, 2) else None
    if ord == 2:
        powers = local.square() if not local.is_complex() else (local * local.conj()).real
    elif zero is None:
        powers = local.abs() if ord == 1 else local.abs().pow(ord)
    else:
        size = local.abs()
        powers = size.masked_fill(zero, 1.0).pow(ord).masked_fill(zero, 0.0) + _bent(size, zero)
    total = powers.sum(dims, keepdim)
    if ord < 0:
        assert zero is not None
        zeros = zero.sum(dims, keepdim, dtype=total.dtype)
        total, none = finish(torch.stack((total, zeros)), x._spec, dims).unbind()
        none = (none > 0) & ~total.isnan()
    else:
        total = finish(total, x._spec, dims)
        none = total == 0
    if ord != 1:
        root = total.masked_fill(none, 1.0).pow(1 / ord).masked_fill(none, 0.0)
        total = root + _bent(total, none) if ord == 2 else root
    return total.to(x.dtype.to_real())


def _bent(x: Tensor, where: Tensor) -> Tensor:
    """Zeros without slope, whose second derivative where x is zero is NaN."""
    return x.masked_fill(~where, 1.0).pow(1.5) * 0


@rule("dist")
def dist(input: Tensor, other: Tensor, p: float = 2) -> Tensor:
    return torch.linalg.vector_norm(input - other, p)


@rule("norm")
def norm(
    input: Tensor, p: Any = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    """The builtin below torch.norm: vector norms, of which the Frobenius norm is one."""
    if p == "nuc":
        raise UnsupportedOpError(f"the nuclear norm of {getattr(input, '_spec', input.shape)}")
    order = 2 if p is None or p == "fro" else p
    return torch.linalg.vector_norm(input, order, dim, keepdim, dtype=dtype)
