"""Order statistics along one dim, which an all-to-all brings together where it is sharded.

Over all elements, or where no other dim could be sharded instead, they pick from a sorted vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..fallback import fall_back
from ..redistribute import aside, reduced
from ..registry import rule
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from .reduce import over, with_one, without

# quantiles of so many rows are picked one by one
_MOST_ROWS = 32


def _along(fn: Any, input: ShardTensor, *rest: Any, dim: int, keepdim: bool) -> Any:
    """(values, indices) of fn(input, *rest, dim, keepdim)."""
    y = None
    if input.ndim:
        (dim,) = over(dim, input.ndim)
        y = aside(reduced(input), [dim])
    if y is None:
        row = _row(fn, input, *rest)
        if row is None:
            return fall_back(fn, (input, *rest, dim, keepdim), {})
        found = [s.unsqueeze(0) if keepdim else s for s in row]
        return getattr(torch.return_types, fn.__name__)(found)
    spec = without(y._spec, (dim,), keepdim)
    found = fn(y._local, *rest, dim, keepdim)
    return type(found)([wrap(f, spec) for f in found])


def _vector(input: ShardTensor) -> ShardTensor | None:
    """All elements in one dim, where they are real numbers and there are any."""
    if not input.is_floating_point() or not input.numel() or _torch.is_tracing():
        return None
    x = reduced(input).reshape(-1)
    assert isinstance(x, ShardTensor)
    return x


def _row(fn: Any, input: ShardTensor, k: int = 0) -> tuple[Tensor, Tensor] | None:
    """One value of a sorted vector, and its place: the k-th, or that in the middle."""
    x = _vector(input)
    if x is None or fn is torch.mode:
        return None
    values, places = torch.sort(x)
    n, missing = len(x), int(x.isnan().sum())
    if fn is torch.kthvalue:
        if not 0 < k <= n:
            raise RuntimeError(f"kthvalue(): selected number k out of range for dimension 0: {k}")
        at = k - 1
    elif fn is torch.nanmedian:
        at = max(0, n - missing - 1) // 2
    else:
        at = n - 1 if missing else (n - 1) // 2
    return values[at], places[at]


def _of_all(fn: Any, input: ShardTensor) -> Tensor:
    row = _row(fn, input)
    return fall_back(fn, (input,), {}) if row is None else row[0]


@rule("median")
def median(input: ShardTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return _of_all(torch.median, input)
    return _along(torch.median, input, dim=dim, keepdim=keepdim)


@rule("nanmedian")
def nanmedian(input: ShardTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return _of_all(torch.nanmedian, input)
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
        found = None
        if plain and isinstance(input, ShardTensor) and (dim is None or input.ndim == 1):
            found = _quantile_of_vector(fn, input, q, interpolation)
        if found is None:
            return fall_back(fn, arguments, {"interpolation": interpolation})
        return found.reshape(*found.shape, *[1] * input.ndim) if keepdim else found
    # torch refuses an empty tensor
    some = with_one(y._local, range(y.ndim), 0.0)
    local = fn(some, q, d, keepdim, interpolation=interpolation)
    spec = without(y._spec, (d,), keepdim)
    if isinstance(q, Tensor) and q.ndim:
        spec = spec.with_dims([Dim(len(q)), *spec.dims])
    return wrap(local[tuple(slice(n) for n in spec.local_shape)], spec)


def _quantile_of_vector(fn: Any, input: ShardTensor, q: Any, how: str) -> Tensor | None:
    """Quantiles over all elements: rows of the sorted vector, and what lies between two."""
    x = _vector(input)
    q = torch.as_tensor(q, dtype=input.dtype)
    if x is None or q.numel() > _MOST_ROWS or not bool(((q >= 0) & (q <= 1)).all()):
        return None
    values, missing = torch.sort(x).values, int(x.isnan().sum())
    n = len(x) - (missing if fn is torch.nanquantile else 0)
    last = len(x) - 1
    places = q.flatten() * max(0, n - 1)
    if n <= 0 or (missing and fn is torch.quantile):
        places = torch.full_like(places, last)
    rounding = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}.get(how)
    if rounding is not None:
        places = rounding(places)

    def rows(at: Tensor) -> Tensor:
        return torch.stack([values[int(i)] for i in at.long()])

    found = rows(places)
    if how in ("linear", "midpoint"):
        part = places - places.floor() if how == "linear" else torch.full_like(places, 0.5)
        found = found.lerp(rows(places.ceil()), part)
    return found.reshape(q.shape)


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
