"""Largest and smallest values and where they are: each rank's candidates, then the best of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...dispatch.trial import tried
from ...registry import rule
from ...spec import Spec
from ...tensor import ShardTensor, wrap
from ...tensor.recut import apart
from ...tensor.redistribute import reduced
from .. import flat
from ..empty import with_one
from ..pointwise import function_rule, pointwise
from ..reduce import Dims, axes_of, over, stacked, wide, with_elements, without


def _worst(x: Tensor, largest: bool) -> Any:
    """A value that loses against every other."""
    if x.dtype is torch.bool:
        return not largest
    if not x.is_floating_point():
        info = torch.iinfo(x.dtype)
        return info.min if largest else info.max
    return float("-inf") if largest else float("inf")


def _filled(local: Tensor, dims: tuple[int, ...], largest: bool) -> Tensor:
    """The local tensor; one worst row where this rank has none, so that it can be reduced."""
    return with_one(local, dims, _worst(local, largest))


def _check(x: ShardTensor, dims: tuple[int, ...], name: str) -> None:
    if any(x.shape[d] == 0 for d in dims):
        raise IndexError(f"{name}(): Expected reduction dim to have non-zero size")


def _extreme(
    input: ShardTensor, dim: Dims, keepdim: bool, largest: bool, nan_ties: bool = False
) -> Tensor:
    """amax or amin; the gradient is shared evenly by all that tie, on whatever rank.

    nan_ties: NaNs tie with each other, as for max and min of all elements.
    """
    x = reduced(input)
    dims = over(dim, x.ndim)
    name = "amax" if largest else "amin"
    fn = torch.amax if largest else torch.amin
    one = torch.max if largest else torch.min
    if x.is_complex():
        tried(one if nan_ties else fn, x)
    _check(x, dims, name)
    x = apart(x, dims)
    spec = without(x._spec, dims, keepdim)
    if not axes_of(x._spec, dims):
        return wrap(one(x._local) if nan_ties else fn(x._local, dims, keepdim), spec)
    filled = _filled(x._local, dims, largest)
    best = one(filled).reshape([1] * x.ndim) if nan_ties else fn(filled, dims, True)
    if _torch.differentiated(best):
        same = x._local.detach() == best.detach()
        if nan_ties:
            same |= x._local.detach().isnan() & best.detach().isnan()
        ties = same.sum(dims, keepdim)
        best = best_of(best if keepdim else best.squeeze(dims), ties, x._spec, dims, fn, nan_ties)
    else:
        best = fn(stacked(best if keepdim else best.squeeze(dims), x._spec, dims), 0)
    return wrap(best, spec)


def best_of(
    part: Tensor, ties: Tensor, spec: Spec, dims: tuple[int, ...], fn: Any, lone: bool = False
) -> Tensor:
    """The best of every rank's part; a rank's share of the gradient is its share of the ties.

    A cotangent of NaN times a share of zero is NaN; lone: what does not tie has no share.
    """
    dtype = wide(part.dtype)
    both = stacked(torch.stack((part.to(dtype), ties.to(dtype))), spec, dims)
    parts, n = both[:, 0], both[:, 1].detach()
    best = fn(parts.detach(), 0)
    n = torch.where((parts.detach() == best) | (parts.detach().isnan() & best.isnan()), n, 0)
    share = n / n.sum(0)
    ends = torch.where(n > 0, parts * share, 0).sum(0)
    parts = torch.where(n > 0, parts, 0) if lone else parts
    mean = (parts.nan_to_num(0.0, 0.0, 0.0) * share).sum(0)
    # the mean of equal numbers may differ from them by a rounding
    ends = torch.where(best.isfinite(), 0, ends)
    return (best + (mean - mean.detach()) + ends).to(part.dtype)


@rule("amax")
def amax(input: ShardTensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    return _extreme(input, dim, keepdim, True)


@rule("amin")
def amin(input: ShardTensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    return _extreme(input, dim, keepdim, False)


@rule("aminmax")
def aminmax(input: ShardTensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    dims: tuple[int, ...] = () if dim is None else (dim,)
    if dim is None and keepdim:
        dims = tuple(range(input.ndim))
    low, high = amin(input, dims, keepdim), amax(input, dims, keepdim)
    return torch.return_types.aminmax((low, high))


def _along(
    input: ShardTensor, dim: int, keepdim: bool, largest: bool
) -> tuple[ShardTensor, ShardTensor]:
    """(value, global index of its first occurrence) along one dim."""
    x = reduced(input)
    if x.is_complex():
        tried(torch.max if largest else torch.min, x, dim)
    if x.ndim == 0:
        over(dim, 0)
        return wrap(x._local.clone(), x._spec), wrap(torch.zeros_like(x._local).long(), x._spec)
    (d,) = over(dim, x.ndim)
    _check(x, (d,), "max" if largest else "min")
    x = apart(x, (d,))
    fn = torch.max if largest else torch.min
    spec = without(x._spec, (d,), keepdim)
    if not axes_of(x._spec, (d,)):
        value, index = fn(x._local, d, keepdim)
        return wrap(value, spec), wrap(index, spec)
    value, index = fn(_filled(x._local, (d,), largest), d, keepdim)
    values = stacked(value, x._spec, (d,))
    indices = stacked(index + x._spec.offset[d], x._spec, (d,))
    held = with_elements(x._spec, (d,))
    if len(held) < len(values):
        # what stands for an empty shard must not win against an infinite element
        values, indices = values[held], indices[held]
    # torch takes the first of equal values, and a NaN before all others
    winner = fn(values.detach(), 0, True)[1]
    return (
        wrap(values.gather(0, winner).squeeze(0), spec),
        wrap(indices.gather(0, winner).squeeze(0), spec),
    )


@function_rule("max", "min")
def max_or_min(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    largest = func.__name__.startswith("max")
    second = args[1] if len(args) > 1 else kwargs.get("other")
    if isinstance(second, Tensor):
        return pointwise(torch.maximum if largest else torch.minimum, args, kwargs)
    return _max_or_min(largest, *args, **kwargs)


def _max_or_min(
    largest: bool,
    input: ShardTensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    axis: int | None = None,
    keepdims: bool = False,
) -> Any:
    dim, keepdim = axis if dim is None else dim, keepdim or keepdims
    if dim is None:
        return _extreme(input, None, False, largest, True)
    kind = torch.return_types.max if largest else torch.return_types.min
    return kind(_along(input, dim, keepdim, largest))


@rule("argmax")
def argmax(input: ShardTensor, dim: int | None = None, keepdim: bool = False) -> ShardTensor:
    return _arg(input, dim, keepdim, True)


@rule("argmin")
def argmin(input: ShardTensor, dim: int | None = None, keepdim: bool = False) -> ShardTensor:
    return _arg(input, dim, keepdim, False)


def _arg(input: ShardTensor, dim: int | None, keepdim: bool, largest: bool) -> ShardTensor:
    """The place of the largest or smallest element, the first of equal ones."""
    x = reduced(input.detach())
    if x.is_complex() or x.dtype is torch.bool:
        tried(torch.argmax if largest else torch.argmin, x)
    if dim is not None:
        return _along(x, dim, keepdim, largest)[1]
    every = tuple(range(x.ndim))
    _check(x, every, "argmax" if largest else "argmin")
    local = _filled(x._local, every, largest)
    fn = torch.max if largest else torch.min
    value, at = fn(local.flatten(), 0)
    at = flat.whole(at, local.shape, x._spec)
    axes = axes_of(x._spec, every)
    if axes:
        group = comm.group(x._spec.mesh, axes)
        ranks = [1] * comm.size(group)
        values = comm.gather(value[None], 0, ranks, group)
        places = comm.gather(at[None], 0, ranks, group)
        best = fn(values, 0)[0]
        ties = (values == best) | (values.isnan() & best.isnan())
        # the first of equals in the order of the whole tensor
        at = torch.where(ties, places, x.numel()).min()
    spec = without(x._spec, every, keepdim)
    return wrap(at.reshape(spec.shape), spec)
