"""Scans along a sharded dim: each rank scans its rows, then adds what earlier shards come to.

Every rank gets the last rows of the shards before it, in one small exchange; nothing else is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.return_types import cummax as Cummax
from torch.return_types import cummin as Cummin

from .. import comm
from ..fallback import fall_back
from ..redistribute import reduced
from ..registry import rule
from ..tensor import ShardTensor, wrap
from ..views import check_writable
from .reduce import wide
from .shape import _index


def _before(x: ShardTensor, d: int, *scanned: Tensor) -> list[Tensor]:
    """The last rows along d of all shards before this one, of each scan.

    A rank that has none before it must use them all the same: backward sends on every rank.
    """
    dim = x._spec.dims[d]
    name = comm.group(x._spec.mesh, dim.axes)
    rows = [min(1, n) for n in dim.sizes]
    windows = [(0, n) for n in accumulate(rows, initial=0)][:-1]
    me = x._spec.index[d]
    last = [s.narrow(d, s.shape[d] - rows[me], rows[me]) for s in scanned]
    return [comm.window(t, d, rows, windows, name) for t in last]


def _scan(
    x: ShardTensor,
    dim: int,
    dtype: Any,
    scan: Callable[[Tensor, int], Tensor],
    combine: Callable[[Tensor, Tensor, int], Tensor],
) -> ShardTensor:
    x = reduced(x)
    d = _index(dim, max(1, x.ndim))
    local = x._local if dtype is None else x._local.to(dtype)
    if x.ndim == 0 or len(x._spec.dims[d].sizes) < 2:
        return wrap(scan(local, d), x._spec)
    # halves are rounded once, as on one device
    y = scan(local.to(wide(local.dtype)), d)
    y = combine(y, _before(x, d, y)[0], d)
    kept = local.dtype if local.is_floating_point() or local.is_complex() else y.dtype
    return wrap(y.to(kept), x._spec)


@rule("cumsum")
def cumsum(input: ShardTensor, dim: int, *, dtype: Any = None) -> ShardTensor:
    return _scan(input, dim, dtype, torch.cumsum, lambda y, b, d: y + b.sum(d, keepdim=True))


@rule("cumprod")
def cumprod(input: ShardTensor, dim: int, *, dtype: Any = None) -> ShardTensor:
    return _scan(input, dim, dtype, torch.cumprod, lambda y, b, d: y * b.prod(d, keepdim=True))


@rule("logcumsumexp")
def logcumsumexp(input: ShardTensor, dim: int) -> Tensor:
    if input.is_complex():
        return fall_back(torch.logcumsumexp, (input, dim), {})

    def combine(y: Tensor, before: Tensor, d: int) -> Tensor:
        if not before.shape[d]:
            return y + before.sum(d, keepdim=True)
        both = torch.stack([y, before.logsumexp(d, keepdim=True).expand_as(y)])
        return both.logsumexp(0)

    return _scan(input, dim, None, torch.logcumsumexp, combine)


def _in_place(scan: Callable[..., ShardTensor]) -> Callable[..., ShardTensor]:
    def run(input: ShardTensor, dim: int, *, dtype: Any = None) -> ShardTensor:
        check_writable(input, f"{scan.__name__}_")
        # a copy, which backward may keep
        held = wrap(input._local.clone(), input._spec)
        input._local.copy_(scan(held, dim, dtype=dtype)._local)
        return input

    return run


rule("cumsum_")(_in_place(cumsum))
rule("cumprod_")(_in_place(cumprod))


def _extremes(input: ShardTensor, dim: int, scan: Any, kind: Any, ahead: Any) -> Any:
    """(values, indices) of a running extreme; the later of equal ones counts, NaN before all."""
    x = reduced(input)
    d = _index(dim, max(1, x.ndim))
    values, indices = scan(x._local, d)
    if x.ndim == 0 or len(x._spec.dims[d].sizes) < 2:
        return kind((wrap(values, x._spec), wrap(indices, x._spec)))
    indices = indices + x._spec.offset[d]
    tops, places = _before(x, d, values, indices)
    n = tops.shape[d]
    if not n:
        values = values + tops.sum(d, keepdim=True).to(values.dtype)
    else:
        best, row = (s.narrow(d, n - 1, 1) for s in scan(tops, d))
        where = places.gather(d, row)
        # a NaN is unlike itself
        own = (values != values) | ((best == best) & ahead(values, best))
        values = torch.where(own, values, best)
        indices = torch.where(own, indices, where)
    return kind((wrap(values, x._spec), wrap(indices, x._spec)))


@rule("cummax")
def cummax(input: ShardTensor, dim: int) -> Any:
    return _extremes(input, dim, torch.cummax, Cummax, torch.ge)


@rule("cummin")
def cummin(input: ShardTensor, dim: int) -> Any:
    return _extremes(input, dim, torch.cummin, Cummin, torch.le)
