"""Running sums, products and extrema along a sharded dim.

Every shard scans its own rows after the totals of the non-empty shards before it, one row each: the
only message. So zeros, infinities and NaN, and their gradients, are those of the stock op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from ..comm.exchanges import FEW, whole
from ..comm.formats import compact
from ..cuts import Cut, Kept, cut
from ..dispatch.fallback import fall_back
from ..registry import rule
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from ..tensor.recut import aside
from ..tensor.redistribute import reduced, to_dims
from .empty import joined, stock, through, with_one
from .in_place import assigned
from .reduce import given, over, wide

Total = Callable[[Tensor, int], Tensor]


@cached
def _before(dim: Dim) -> tuple[Cut, Kept[tuple[int, int]]]:
    """(how many totals each shard has: one or none, which of them come before each shard)."""
    have = cut(min(1, n) for n in dim.sizes)
    return have, Kept((0, s) for s in have.offsets[:-1])


def _totals(x: ShardTensor, d: int, total: Tensor) -> Tensor:
    """The totals of the shards before this one, in order, from each non-empty shard's own."""
    have, windows = _before(x._spec.dims[d])
    group = comm.along(x._spec, d)
    if len(have) <= FEW:
        return comm.window(total, d, have, windows, group)
    # those behind it, too: by one all-gather
    every = comm.window(total, d, have, whole(have), group)
    return every.narrow(d, 0, windows[x._spec.index[d]][1])


def _scan(
    fn: Any, total: Total, input: ShardTensor, dim: int, unread: Total | None = None, **options: Any
) -> ShardTensor:
    """unread: in place of the total of the last shard with rows, which nobody reads."""
    x = reduced(input)
    dims = over(dim, x.ndim)
    if not dims or not x._spec.dims[dims[0]].is_cut:
        local = stock(lambda z: fn(z, dim, **options), x._local.shape, x._local)
        return wrap(local, x._spec)
    (d,) = dims
    out = given(fn, x._local, **options)
    local = x._local.to(wide(out))
    # an empty shard has a total too, and sends none: traced graphs must have the same messages
    row = [min(1, n) if i == d else n for i, n in enumerate(local.shape)]
    if unread and not any(x._spec.dims[d].sizes[x._spec.index[d] + 1 :]):
        total = unread
    before = _totals(x, d, stock(lambda z: total(z, d), row, with_one(local, dims, 1)))
    rows = joined([before, local], d)
    found = stock(lambda z: fn(z, d), rows.shape, rows)
    own = compact(found.narrow(d, before.shape[d], local.shape[d]), found)
    return wrap(own.to(out), x._spec)


def _unread(t: Tensor, d: int) -> Tensor:
    """A row without the slope of a total, which times zero would be NaN beside infinity.

    Backward keeps what it is made of, as a total's does, and raises if that was written to. It has
    derivatives of all orders, as a total has: what they send must be sent by all ranks.
    """
    row = t.narrow(d, 0, 1)
    if row.is_complex():
        return row * row
    # beyond the bounds its slopes are 0; integers, which it would make floating-point, have none
    return row.clamp(-1, 1).sin() if row.is_floating_point() else row


@rule("cumsum")
def cumsum(input: ShardTensor, dim: int, *, dtype: Any = None) -> ShardTensor:
    return _scan(torch.cumsum, lambda t, d: t.sum(d, True, dtype=t.dtype), input, dim, dtype=dtype)


@rule("cumprod")
def cumprod(input: ShardTensor, dim: int, *, dtype: Any = None) -> ShardTensor:
    def scan(t: Tensor, d: int, **options: Any) -> Tensor:
        return through(torch.cumprod(t, d, **options), t, d) if t.ndim else t.cumprod(d, **options)

    def total(t: Tensor, d: int) -> Tensor:
        return through(t.prod(d, True, dtype=t.dtype), t, d)

    return _scan(scan, total, input, dim, _unread, dtype=dtype)


@rule("logcumsumexp", "_logcumsumexp")
def logcumsumexp(input: ShardTensor, dim: int) -> Any:
    if input.is_complex():
        # the imaginary part, which is known up to 2 pi, follows the order of the additions
        x = reduced(input)
        y = aside(x, over(dim, x.ndim))
        if y is None:
            return fall_back(torch.logcumsumexp, (x, dim), {})
        local = stock(lambda z: torch.logcumsumexp(z, dim), y._local.shape, y._local)
        return to_dims(wrap(local, y._spec), x._spec.dims)
    return _scan(torch.logcumsumexp, lambda t, d: t.logsumexp(d, True), input, dim, _unread)


@rule("cumsum_")
def cumsum_(input: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    return assigned(input, "cumsum_", lambda: torch.cumsum(input, dim, dtype=dtype))


@rule("cumprod_")
def cumprod_(input: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    # the gradient needs the factors, which are overwritten
    return assigned(input, "cumprod_", lambda: torch.cumprod(input.clone(), dim, dtype=dtype))


@rule("cummax")
def cummax(input: ShardTensor, dim: int) -> Any:
    return torch.return_types.cummax(_extrema(torch.cummax, input, dim))


@rule("cummin")
def cummin(input: ShardTensor, dim: int) -> Any:
    return torch.return_types.cummin(_extrema(torch.cummin, input, dim))


def _extrema(fn: Any, input: ShardTensor, dim: int) -> tuple[ShardTensor, ShardTensor]:
    """(values, the global index of the last row that has each)."""
    x = reduced(input)
    dims = over(dim, x.ndim)
    if not dims or not x._spec.dims[dims[0]].is_cut:
        values, indices = stock(lambda z: fn(z, dim), x._local.shape, x._local)
        return wrap(values, x._spec), wrap(indices, x._spec)
    (d,) = dims
    local, start = x._local, x._spec.offset[d]
    # picked by index, since the stock op's gradient drops that of an empty shard, message and all
    last = fn(local.detach(), d)[1].narrow(d, max(0, local.shape[d] - 1), min(1, local.shape[d]))
    before = _totals(x, d, local.gather(d, last))
    places = _totals(x, d, last + start)
    n, rows = before.shape[d], joined([before, local], d)
    at = fn(rows.detach(), d)[1].narrow(d, n, local.shape[d])
    found = at + (start - n)
    if n:
        found = torch.where(at < n, places.gather(d, at.clamp(max=n - 1)), found)
    return wrap(rows.gather(d, at), x._spec), wrap(found, x._spec)
