"""Counting and searching: every rank in its own part, then the counts added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...dispatch.fallback import fall_back
from ...dispatch.trial import tried
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.recut import aside
from ...tensor.redistribute import fit, local_of, reduced, replicate, to_dims
from .. import labels
from ..operands import Dims, dims_of, lifted
from ..pointwise import align
from ..reduce import axes_of, finish, over


def _settled(x: Any) -> Any:
    """x, without addends and without a gradient."""
    return reduced(x.detach()) if isinstance(x, Tensor) else x


def _back(found: ShardTensor, own: Dims) -> ShardTensor:
    """found cut as `own` where it is whole since another operand was larger."""
    dims = [
        o if o.axes and not set(o.axes) & set(found._spec.varying) else f
        for o, f in zip(own, found._spec.dims, strict=True)
    ]
    return to_dims(found, dims)


# searching ---------------------------------------------------------------------------------------


@rule("searchsorted")
def searchsorted(
    sorted_sequence: Tensor,
    input: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> ShardTensor:
    """Of a sharded sequence every rank counts its own elements below each value.

    Where the same ranks share out sequence and values, the smaller of the two is gathered.
    """
    seq, values = _settled(sorted_sequence), _settled(input)
    if sorter is not None:
        if sorter.shape != seq.shape:
            raise RuntimeError(
                "torch.searchsorted(): boundary and sorter must have the same size, but got "
                f"{list(seq.shape)} and {list(sorter.shape)}"
            )
        seq = torch.gather(seq, -1, sorter)
    options: dict[str, Any] = {"out_int32": out_int32, "right": right, "side": side}
    if not isinstance(values, Tensor):
        seq = replicate(seq) if seq.ndim != 1 else seq
        found = torch.searchsorted(seq._local, values, **options)
        return wrap(finish(found, seq._spec, (0,)), seq._spec.with_dims(()))
    if seq.ndim != 1 and seq.shape[:-1] != values.shape[:-1]:
        raise RuntimeError(
            "torch.searchsorted(): boundaries tensor should be 1 dimension or the first N-1 "
            "dimensions of boundaries tensor and input value tensor must match, but we got "
            f"boundaries tensor {list(seq.shape)} and input value tensor {list(values.shape)}"
        )
    *lead, last = [f"d{i}" for i in range(values.ndim)] or [""]
    terms = (("s",) if seq.ndim == 1 else (*lead, "s"), (*lead, last)[: values.ndim])

    def search(seq: Tensor, values: Tensor) -> Tensor:
        return torch.searchsorted(seq.contiguous(), values.contiguous(), **options)

    return _back(labels.run((*terms, terms[1]), search, seq, values), dims_of(values))


@rule("bucketize")
def bucketize(
    input: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> ShardTensor:
    if boundaries.ndim != 1:
        raise RuntimeError(f"boundaries tensor must be 1 dimension, but got dim({boundaries.ndim})")
    return searchsorted(boundaries, input, out_int32=out_int32, right=right)


@rule("isin")
def isin(
    elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False
) -> ShardTensor:
    """Where the same ranks share out both, the smaller of the two is gathered."""
    x, tests = _settled(elements), _settled(test_elements)
    if not (isinstance(x, Tensor) and isinstance(tests, Tensor)):
        of, number = (x, tests) if isinstance(x, ShardTensor) else (tests, x)
        if isinstance(number, int) and not _holds(of.dtype, number):
            raise UnsupportedOpError(
                f"isin with {number}, which {of.dtype} does not hold: how torch compares it "
                "depends on the number of elements; cast the tensor first"
            )
        a, b = map(local_of, (x, tests))
        if of is x:
            return wrap(torch.isin(a, b, invert=invert), of._spec)
        found = comm.reduce(torch.isin(a, b), comm.along(of._spec, *range(of.ndim)), "max")
        return wrap(~found if invert else found, of._spec.with_dims(()))
    each, others = (tuple(f"{k}{i}" for i in range(t.ndim)) for k, t in (("x", x), ("t", tests)))
    found = labels.run((each, others, each), torch.isin, x, tests, op="max")
    return _back(~found if invert else found, dims_of(x))


def _holds(dtype: torch.dtype, number: int) -> bool:
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return True
    return torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


# histograms --------------------------------------------------------------------------------------


def _total(found: Tensor, spec: Spec) -> ShardTensor:
    """Counts of every rank's part, added up."""
    every = range(len(spec.dims))
    return wrap(finish(found, spec, every), spec.with_dims(whole_dims(found.shape)))


def _ends(x: ShardTensor, taken: tuple[int, int] | None = None) -> tuple[float, float]:
    """The least and the largest element; taken: what a plan takes them for."""
    if not x.numel():
        # as torch.histogram takes nothing for; it widens a range without width only if it found it
        return 0.0, 1.0
    low, high = x.aminmax()
    return taken or (low.item(), high.item())


@rule("histc")
def histc(input: ShardTensor, bins: int = 100, min: float = 0, max: float = 0) -> ShardTensor:
    x, low, high = _settled(input), min, max
    if x.dtype not in (torch.float32, torch.float64):
        tried(torch.histc, x, bins)
    if low == high and axes_of(x._spec, range(x.ndim)):
        if _torch.is_tracing():
            return fall_back(torch.histc, (x, bins, min, max), {})
        if x.numel():
            low, high = _ends(x)
        # torch's own words about what is not finite
        torch.histc(x._local.new_tensor([low, high]), bins, low, high)
        low, high = (low - 1, high + 1) if low == high else (low, high)
    return _total(torch.histc(x._local, bins, low, high), x._spec)


@rule("histogram")
def histogram(
    input: Tensor,
    bins: Any = 100,
    *,
    range: Any = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> Any:
    """Each rank counts its elements; counts are added up."""
    if weight is not None and weight.shape != input.shape:
        options = {"range": range, "weight": weight, "density": density}
        known = {k: v for k, v in options.items() if v is not None}
        return fall_back(torch.histogram, (input, bins), known)
    if input.dtype not in (torch.float32, torch.float64):
        tried(torch.histogram, input.reshape(-1), 1)
    given = [_settled(t) for t in (input, weight) if t is not None]
    given[0] = lifted(given[0], weight, bins)
    spec, wanted = align(*given)
    x, *w = fit(spec.mesh, (), *zip(given, wanted, strict=True))
    options = {"weight": w[0] if w else None}
    if isinstance(bins, Tensor):
        bins = replicate(bins)._local if isinstance(bins, ShardTensor) else bins
    elif range is None:
        if _torch.is_tracing():
            raise UnsupportedOpError(
                f"histogram of {spec} by its least and largest element cannot be compiled: give "
                "range="
            )
        options["range"] = _ends(wrap(x, spec))
    else:
        options["range"] = range
    found, edges = torch.histogram(x, bins, **options)
    return _dense(torch.return_types.histogram, _total(found, spec), (edges,), density)


def _dense(kind: Any, counts: ShardTensor, edges: Sequence[Tensor], density: bool) -> Any:
    """The result of a histogram; density: divided by the sum and by the sizes of the bins."""
    whole = [wrap(e, counts._spec.with_dims([Dim(len(e))])) for e in edges]
    if density:
        local = counts._local / counts._local.sum()
        for d, e in enumerate(edges):
            local = local / e.diff().view(-1, *[1] * (local.ndim - 1 - d))
        counts = wrap(local, counts._spec)
    return kind((counts, whole[0] if kind is torch.return_types.histogram else tuple(whole)))


@rule("histogramdd")
def histogramdd(
    input: Tensor,
    bins: Any,
    range: Any = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> Any:
    """Each rank counts its points, which are whole; counts are added up."""
    options = {"range": range, "weight": weight, "density": density}
    plain = isinstance(bins, int) or all(isinstance(b, int) for b in bins)
    if not isinstance(input, ShardTensor) or not input.numel() or _torch.is_tracing():
        return fall_back(torch.histogramdd, (input, bins), options)
    if not plain:
        bins = [b.full_tensor() if isinstance(b, ShardTensor) else b for b in bins]
    x = _settled(input)
    y = aside(x, [x.ndim - 1])
    if y is None or (weight is not None and weight.shape != x.shape[:-1]):
        return fall_back(torch.histogramdd, (input, bins), options)
    if plain and range is None:
        low, high = (f(y, over(None, y.ndim - 1)) for f in (torch.amin, torch.amax))
        range = torch.stack((low._local, high._local), 1).flatten().tolist()  # type: ignore[attr-defined]
    (w,) = fit(y._spec.mesh, (), (_settled(weight), y._spec.dims[:-1]))
    found = torch.histogramdd(y._local, bins, range=range, weight=w)
    return _dense(type(found), _total(found.hist, y._spec), found.bin_edges, density)


@rule("bincount")
def bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> ShardTensor:
    given = [_settled(t) for t in (input, weights) if t is not None]
    whole = weights is not None and weights.shape != input.shape
    if whole or input.ndim != 1 or input.is_floating_point() or minlength < 0:
        return fall_back(torch.bincount, (input, weights, minlength), {})
    spec, wanted = align(*given)
    eager("bincount", spec)
    x, *w = fit(spec.mesh, (), *zip(given, wanted, strict=True))
    # a plan takes what is asked for to be enough
    enough = minlength and comm.spreads(comm.group(spec.mesh, spec.varying))
    low, high = _ends(wrap(x.long(), spec), (0, minlength - 1) if enough else None)
    if low < 0:
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    most = max(minlength, int(high) + 1 if input.numel() else 0)
    counts = torch.bincount(x, w[0] if w else None, most)
    if weights is not None:
        # of no elements torch counts in integers
        counts = counts.to(torch.float32 if weights.dtype is torch.float32 else torch.float64)
    return _total(counts, spec)


def eager(op: str, spec: Spec) -> None:
    comm.check_values(comm.group(spec.mesh, spec.varying))
    if _torch.is_tracing():
        what = "the size of the result depends on values, so it cannot be compiled"
        raise UnsupportedOpError(f"{op} on {spec}: {what}; leave it out of st.compile")
