"""Order statistics along one dim, which an all-to-all brings together where it is sharded.

Over all elements, or where no other dim could be sharded instead, they run gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fallback import fall_back
from ..redistribute import aside, reduced
from ..registry import rule
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from .reduce import over, with_one, without


def _along(fn: Any, input: ShardTensor, *rest: Any, dim: int, keepdim: bool) -> Any:
    """(values, indices) of fn(input, *rest, dim, keepdim)."""
    y = None
    if input.ndim:
        (dim,) = over(dim, input.ndim)
        y = aside(reduced(input), [dim])
    if y is None:
        return fall_back(fn, (input, *rest, dim, keepdim), {})
    spec = without(y._spec, (dim,), keepdim)
    found = fn(y._local, *rest, dim, keepdim)
    return type(found)([wrap(f, spec) for f in found])


@rule("median")
def median(input: ShardTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return fall_back(torch.median, (input,), {})
    return _along(torch.median, input, dim=dim, keepdim=keepdim)


@rule("nanmedian")
def nanmedian(input: ShardTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return fall_back(torch.nanmedian, (input,), {})
    return _along(torch.nanmedian, input, dim=dim, keepdim=keepdim)


@rule("mode")
def mode(input: ShardTensor, dim: int = -1, keepdim: bool = False) -> Any:
    return _along(torch.mode, input, dim=dim, keepdim=keepdim)


@rule("kthvalue")
def kthvalue(input: ShardTensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return _along(torch.kthvalue, input, k, dim=dim, keepdim=keepdim)


def _quantile(
    fn: Any, input: Tensor, q: Any, dim: int | None, keepdim: bool, interpolation: str
) -> Tensor:
    arguments = (input, q, dim, keepdim)
    plain = not isinstance(q, Tensor) or (not isinstance(q, ShardTensor) and not q.requires_grad)
    y = None
    if plain and dim is not None and isinstance(input, ShardTensor) and input.numel():
        (d,) = over(dim, input.ndim)
        y = aside(reduced(input), [d])
    if y is None:
        return fall_back(fn, arguments, {"interpolation": interpolation})
    # torch refuses an empty tensor
    some = with_one(y._local, range(y.ndim), 0.0)
    local = fn(some, q, d, keepdim, interpolation=interpolation)
    spec = without(y._spec, (d,), keepdim)
    if isinstance(q, Tensor) and q.ndim:
        spec = spec.with_dims([Dim(len(q)), *spec.dims])
    return wrap(local[tuple(slice(n) for n in spec.local_shape)], spec)


@rule("quantile")
def quantile(
    input: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *,
    interpolation: str = "linear",
) -> Tensor:  # fmt: skip
    return _quantile(torch.quantile, input, q, dim, keepdim, interpolation)


@rule("nanquantile")
def nanquantile(
    input: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *,
    interpolation: str = "linear",
) -> Tensor:  # fmt: skip
    return _quantile(torch.nanquantile, input, q, dim, keepdim, interpolation)
