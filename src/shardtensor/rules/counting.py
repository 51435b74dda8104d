"""Counts and lookups: each rank counts its part, one all-reduce adds up.

searchsorted over a sharded sequence: a place is the number of smaller elements, a sum over shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _torch, comm
from ..errors import UnsupportedOpError
from ..fallback import fall_back
from ..redistribute import fit, reduced, replicate
from ..registry import rule
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from .pointwise import function_rule


def _total(local: Tensor, x: ShardTensor, op: str = "sum") -> Tensor:
    return comm.reduce(local, comm.group(x._spec.mesh, x._spec.varying), op)


def _bounds(x: ShardTensor) -> tuple[float, float]:
    """The smallest and the largest element; the same on every rank. (0, 0) of no elements."""
    if not x.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(x)
    return low.item(), high.item()


@rule("histc")
def histc(input: ShardTensor, bins: int = 100, min: float = 0, max: float = 0) -> ShardTensor:
    x = reduced(input)
    low, high = (min, max) if min != max else _bounds(x)
    if low == high:
        low, high = low - 1, high + 1
    counts = torch.histc(x._local, bins, low, high)
    return wrap(_total(counts, x), x._spec.with_dims([Dim(bins)]))


@rule("bincount")
def bincount(input: ShardTensor, weights: Tensor | None = None, minlength: int = 0) -> Any:
    x = reduced(input)
    if x.ndim != 1 or x.is_floating_point() or (x.numel() and _bounds(x)[0] < 0):
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    n = max(minlength, int(_bounds(x)[1]) + 1 if x.numel() else 0)
    own: Tensor | None = None
    if weights is not None:
        (own,) = fit(x._spec.mesh, x._spec.varying, (weights, x._spec.dims))
    counts = torch.bincount(x._local, None if own is None else own.detach(), n)
    if own is not None:
        # an empty shard's counts are integers
        counts = counts.to(own.dtype if own.dtype is torch.float32 else torch.float64)
    return wrap(_total(counts, x), x._spec.with_dims([Dim(n)]))


@rule("histogram")
def histogram(
    input: ShardTensor, bins: Any, *, range: Any = None, weight: Tensor | None = None,
    density: bool = False,
) -> Any:  # fmt: skip
    if not isinstance(input, ShardTensor) or isinstance(bins, ShardTensor):
        given = {"range": range, "weight": weight, "density": density}
        kwargs = {k: v for k, v in given.items() if v is not None}
        return fall_back(torch.histogram, (input, bins), kwargs)
    x = reduced(input)
    own: dict[str, Any] = {}
    if weight is not None:
        (found,) = fit(x._spec.mesh, x._spec.varying, (weight, x._spec.dims))
        own = {"weight": None if found is None else found.detach()}
    if isinstance(bins, Tensor):
        counts, edges = torch.histogram(x._local.detach(), bins, **own)
    else:
        low, high = range if range is not None else _bounds(x)
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts, edges = torch.histogram(x._local.detach(), bins, range=(low, high), **own)
    counts = _total(counts, x)
    if density:
        counts = counts / (counts.sum() * edges.diff())
    both = [wrap(t, x._spec.with_dims([Dim(len(t))])) for t in (counts, edges)]
    return torch.return_types.histogram((both[0], both[1]))


@function_rule("searchsorted", "bucketize")
def searchsorted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Places in a sorted sequence; bucketize takes its arguments in the other order."""
    names = ["sorted_sequence", "self"] if "search" in func.__name__ else ["self", "boundaries"]
    given = dict(zip(names, args, strict=False)) | kwargs
    values: Any = given.get("self", given.get("input"))
    sequence: Any = given.get("sorted_sequence", given.get("boundaries"))
    options = {k: v for k, v in kwargs.items() if k in ("right", "side", "out_int32")}
    known = {*names, "input", "sorted_sequence", "boundaries", "right", "side", "out_int32"}
    if len(args) > 2 or set(kwargs) - known or not isinstance(values, Tensor):
        return fall_back(func, args, kwargs)
    if isinstance(sequence, ShardTensor) and sequence._spec.partial:
        sequence = reduced(sequence)
    if isinstance(values, ShardTensor) and values._spec.partial:
        values = reduced(values)
    flat = sequence.ndim == 1
    cut = sequence._spec.dims[-1] if isinstance(sequence, ShardTensor) else Dim(0)
    if flat and not cut.axes:
        sequence = replicate(sequence)._local if isinstance(sequence, ShardTensor) else sequence
        if not isinstance(values, ShardTensor):
            return torch.searchsorted(sequence, values, **options)
        return wrap(torch.searchsorted(sequence, values._local, **options), values._spec)
    if flat:
        mesh = sequence._spec.mesh
        whole = values if not isinstance(values, ShardTensor) else replicate(values)._local
        below = torch.searchsorted(sequence._local, whole.detach(), **options)
        spec = sequence._spec.with_dims([Dim(n) for n in whole.shape])
        return wrap(comm.reduce(below, comm.group(mesh, cut.axes)), spec)
    lead = next(
        (t._spec.dims[:-1] for t in (sequence, values)
         if isinstance(t, ShardTensor) and any(d.axes for d in t._spec.dims[:-1])), None,
    )  # fmt: skip
    if lead is None or values.ndim != sequence.ndim:
        return fall_back(func, args, kwargs)
    mesh = next(t._spec.mesh for t in (sequence, values) if isinstance(t, ShardTensor))
    axes = tuple(a for d in lead for a in d.axes)
    dims = [(t, (*lead, Dim(t.shape[-1]))) for t in (sequence, values)]
    a, b = fit(mesh, axes, *dims)
    assert a is not None and b is not None
    found = torch.searchsorted(a.contiguous(), b, **options)
    like = next(t for t in (sequence, values) if isinstance(t, ShardTensor))
    return wrap(found, like._spec.with_dims([*lead, Dim(values.shape[-1])]))


@rule("isin")
def isin(
    elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    """Elements stay where they are; what they are compared with is brought to every rank."""
    if isinstance(test_elements, ShardTensor):
        test_elements = replicate(test_elements)._local
    if not isinstance(elements, ShardTensor):
        return torch.isin(elements, test_elements, assume_unique=assume_unique, invert=invert)
    x = reduced(elements)
    found = torch.isin(x._local, test_elements, assume_unique=assume_unique, invert=invert)
    return wrap(found, x._spec)


def _uniques(x: ShardTensor) -> Tensor:
    """The sorted distinct elements of all shards, on every rank."""
    own = torch.unique(x._local)
    name = comm.group(x._spec.mesh, x._spec.varying)
    if comm.size(name) == 1:
        return own
    sizes = comm.counts(len(own), own, name)
    return torch.unique(comm.gather(own, 0, sizes, name))


@rule("_unique2")
def unique(
    input: ShardTensor, sorted: bool = True, return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Distinct elements, whole on every rank; the inverse lies as the input does."""
    if _torch.is_tracing():
        raise UnsupportedOpError("unique cannot be compiled: its size depends on values")
    x = reduced(input).detach()
    if x.is_complex() or bool(x.isnan().any()):
        # each NaN is distinct, and which is which is undefined
        return fall_back(torch._unique2, (x, sorted, return_inverse, return_counts), {})
    distinct = _uniques(x)
    spec = x._spec.with_dims([Dim(len(distinct))])
    inverse = torch.searchsorted(distinct, x._local) if x.dtype is not torch.bool else (
        torch.searchsorted(distinct.int(), x._local.int())
    )  # fmt: skip
    counts = _total(torch.bincount(inverse.flatten(), minlength=len(distinct)), x)
    return wrap(distinct, spec), wrap(inverse, x._spec), wrap(counts, spec)
