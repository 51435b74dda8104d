"""Order statistics along sharded dims, or over all elements, without gathering what they are of.

An all-to-all brings a dim together where another can take its shards. Else each rank sorts its own,
and the ranks find the elements of given ranks in the whole order by counting (`sort.cuts`): small
messages, whatever the size of the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...dispatch.fallback import fall_back
from ...registry import rule
from ...spec import Dim, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.recut import aside
from ...tensor.redistribute import fit, reduced, replicate
from ..empty import with_one
from ..reduce import axes_of, over, without
from .sort import FEW, beside, cut_at, cuts, has_keys, keys, lanes


def _picked(local: Tensor, order: Tensor, start: int, group: str) -> tuple[Tensor, Tensor]:
    """The elements at (lanes, m) places of the order of all ranks' (lanes, n): values, indices.

    start: the index of this rank's first element. The same on all ranks; equal elements are in the
    order of the ranks.
    """
    m = order.shape[1]
    found, places = keys(local).sort(stable=True)
    ends = cuts(found, torch.cat([order, order + 1], 1), group)[comm.rank(group)]
    first, mine = ends[:, :m], ends[:, m:] > ends[:, :m]
    # a rank without elements has no such place
    places = with_one(places, (1,), 0)
    at = places.gather(1, first.clamp(max=places.shape[1] - 1))
    values = with_one(local, (1,), 0).gather(1, at)
    index = comm.reduce(torch.where(mine, at + start, 0), group)
    return _only(values, mine, group), index


def _only(values: Tensor, mine: Tensor, group: str) -> Tensor:
    """The values of those ranks whose they are, on all ranks."""
    whole = not values.is_floating_point()
    some = torch.where(mine, values.long() if whole else values, 0)
    return comm.reduce(some, group).to(values.dtype)


def _nans(local: Tensor, group: str) -> Tensor:
    """(lanes, 1): how many elements of each lane are NaN."""
    return comm.reduce(local.detach().isnan().sum(-1, keepdim=True), group)


# medians -----------------------------------------------------------------------------------------


def _along(fn: Any, input: Tensor, *rest: Any, dim: int, keepdim: bool) -> Any:
    """(values, indices) of fn(input, *rest, dim, keepdim)."""
    x, d = cut_at(input, dim)
    if d is not None:
        y = aside(x, [d]) if fn is torch.mode else beside(x, d)
        if y is None and fn is torch.mode:
            return _mode(x, d, keepdim)
        if y is None and not has_keys(x.dtype):
            return fall_back(fn, (x, *rest, dim, keepdim), {})
        if y is None:
            return _nth(fn, x, *rest, d=d, keepdim=keepdim)
        x = y
    spec = without(x._spec, over(dim, x.ndim), keepdim)
    found = fn(x._local, *rest, dim, keepdim)
    return type(found)([wrap(f, spec) for f in found])


def _nth(fn: Any, x: ShardTensor, *rest: Any, d: int, keepdim: bool) -> Any:
    """kthvalue, median or nanmedian along a cut dim."""
    n, local = x.shape[d], lanes(x._local, d)
    group = comm.along(x._spec, d)
    if fn is torch.kthvalue:
        kind, (k,) = torch.return_types.kthvalue, rest
        if not 1 <= k <= n:
            raise RuntimeError(f"kthvalue(): selected number k out of range for dimension {d}")
        order = torch.full((local.shape[0], 1), k - 1, device=local.device)
    else:
        kind = getattr(torch.return_types, fn.__name__)
        order = _middle(fn, n, _nans(local, group))
    found = _picked(local, order, x._spec.offset[d], group)
    spec = without(x._spec, (d,), keepdim)
    values, index = (wrap(f.view(spec.local_shape), spec) for f in found)
    return kind((values, index))


def _middle(fn: Any, n: int, nans: Tensor) -> Tensor:
    """The place of the lower median; NaN comes last, and the first NaN is the median, if any is."""
    if fn is torch.nanmedian:
        return ((n - nans - 1) // 2).clamp(min=0)
    return torch.where(nans > 0, n - nans, (n - 1) // 2)


def _of_all(fn: Any, input: ShardTensor) -> Any:
    """The median of all elements; its gradient is shared evenly by all that equal it."""
    x = reduced(input)
    axes = axes_of(x._spec, range(x.ndim))
    if not axes or not x.numel():
        return wrap(fn(x._local), without(x._spec, range(x.ndim), False))
    if not has_keys(x.dtype):
        return fall_back(fn, (x,), {})
    group = comm.group(x._spec.mesh, axes)
    local = x._local.reshape(1, -1)
    order = _middle(fn, x.numel(), _nans(local, group))
    best = _picked(local.detach(), order, 0, group)[0].view(())
    if _torch.differentiated(x._local):
        equal = torch.where(best.isnan(), x._local.detach().isnan(), x._local.detach() == best)
        mean = torch.where(equal, x._local, 0).sum() / comm.reduce(equal.sum(), group)
        mean = comm.reduce(mean, group)
        # the mean of equal numbers may be off by a rounding
        best = torch.where(best.isfinite(), best + (mean - mean.detach()), mean)
    return wrap(best, without(x._spec, range(x.ndim), False))


def _define_median(fn: Any) -> None:
    @rule(fn.__name__)
    def median(input: ShardTensor, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            return _of_all(fn, input)
        return _along(fn, input, dim=dim, keepdim=keepdim)


_define_median(torch.median)
_define_median(torch.nanmedian)


@rule("kthvalue")
def kthvalue(input: ShardTensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return _along(torch.kthvalue, input, k, dim=dim, keepdim=keepdim)


@rule("mode")
def mode(input: ShardTensor, dim: int = -1, keepdim: bool = False) -> Any:
    return _along(torch.mode, input, dim=dim, keepdim=keepdim)


def _mode(x: ShardTensor, d: int, keepdim: bool) -> Any:
    """Of a vector: the longest run of the sorted elements, the first of such; its last index."""
    if x.numel() <= FEW:
        # torch's own choice among equal elements, too
        return _along(torch.mode, replicate(x), dim=d, keepdim=keepdim)
    if x.numel() != x.shape[d] or _torch.is_tracing() or not has_keys(x.dtype):
        return fall_back(torch.mode, (x, d, keepdim), {})
    values, indices = torch.sort(x.detach().reshape(-1), stable=True)
    _, counts = torch.unique_consecutive(values, return_counts=True)
    end = int(counts.cumsum(0)[int(counts.argmax())])
    index = indices[end - 1]
    value = x.reshape(-1)[int(index)]
    shape = without(x._spec, (d,), keepdim).shape
    return torch.return_types.mode((value.reshape(shape), index.reshape(shape)))


# quantiles ---------------------------------------------------------------------------------------


def _quantile(
    fn: Any, input: Tensor, q: Any, dim: int | None, keepdim: bool, interpolation: str
) -> Tensor:
    """The two order statistics around each quantile, by counting, interpolated."""
    if not isinstance(input, ShardTensor):
        spec, q = q._spec, replicate(q)._local
        found = fn(input, q, dim, keepdim, interpolation=interpolation)
        return wrap(found, spec.with_dims(whole_dims(found.shape)))
    x = reduced(input)
    q = replicate(q)._local if isinstance(q, ShardTensor) else q
    # what torch has to say about q
    fn(x._local.new_zeros(1), q, interpolation=interpolation)
    dims = tuple(range(x.ndim)) if dim is None else over(dim, x.ndim)
    axes = axes_of(x._spec, dims)
    if axes and x.numel() and dim is not None:
        y = beside(x, dims[0])
        if y is not None:
            x, axes = y, ()
    spec = without(x._spec, dims, keepdim)
    lead = [Dim(len(q))] if isinstance(q, Tensor) and q.ndim else []
    out = spec.with_dims([*lead, *spec.dims])
    if axes and x.numel():
        local = x._local.reshape(1, -1) if dim is None else lanes(x._local, dims[0])
        found = _interpolated(fn, x, local, dims, axes, q, interpolation)
        return wrap(found.t().reshape(out.local_shape), out)
    (q,) = fit(x._spec.mesh, x._spec.varying, (q, None)) if isinstance(q, Tensor) else (q,)
    # torch refuses an empty tensor
    some = with_one(x._local, range(x.ndim), 0.0) if x.numel() else x._local
    found = fn(some, q, dim, keepdim, interpolation=interpolation)
    return wrap(found[tuple(slice(n) for n in out.local_shape)], out)


def _interpolated(
    fn: Any, x: ShardTensor, local: Tensor, dims: Any, axes: Any, q: Any, interpolation: str
) -> Tensor:
    """(lanes, quantiles), by torch's own formula."""
    n = 1
    for d in dims:
        n *= x.shape[d]
    group = comm.group(x._spec.mesh, axes)
    q = torch.as_tensor(q, dtype=local.dtype, device=local.device).reshape(1, -1)
    (q,) = fit(x._spec.mesh, [a for a in x._spec.varying if a not in axes], (q, None))
    nans = _nans(local, group)
    if fn is torch.nanquantile:
        order = (q * (n - nans - 1)).clamp(min=0)
    else:
        # the last element is then NaN
        order = torch.where(nans > 0, n - 1, q * (n - 1))
    if interpolation in ("lower", "higher", "nearest"):
        name = {"lower": "floor", "higher": "ceil", "nearest": "round"}[interpolation]
        return _picked(local, getattr(order, name)().long(), 0, group)[0]
    below, above = order.detach().long(), order.detach().ceil().long()
    values, _ = _picked(local, torch.cat([below, above], 1), 0, group)
    low, high = values.chunk(2, 1)
    weight = torch.full_like(order, 0.5) if interpolation == "midpoint" else order - below
    return torch.lerp(low, high, weight)


def _define_quantile(fn: Any) -> None:
    @rule(fn.__name__)
    def quantile(
        input: Tensor,
        q: Any,
        dim: int | None = None,
        keepdim: bool = False,
        *,
        interpolation: str = "linear",
    ) -> Tensor:
        return _quantile(fn, input, q, dim, keepdim, interpolation)


_define_quantile(torch.quantile)
_define_quantile(torch.nanquantile)
