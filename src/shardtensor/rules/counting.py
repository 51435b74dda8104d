"""Counting and searching: every rank in its own part, then the counts added up.

Distinct values come together from each rank's own, and are the same on all ranks; where each
element went stays sharded like the input. Runs stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch, comm
from .._torch import kernels
from ..dispatch.fallback import fall_back
from ..dispatch.trial import tried
from ..errors import UnsupportedOpError
from ..registry import rule
from ..spec import Dim, Spec, whole_dims
from ..tensor import ShardTensor, wrap
from ..tensor.recut import aside, on_dim
from ..tensor.redistribute import fit, local_of, reduced, replicate, to_dims
from . import labels
from .pointwise import align, function_rule
from .reduce import axes_of, finish, over
from .rows import Dims, dims_of, mesh_of


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


def _ends(x: ShardTensor) -> tuple[float, float]:
    """The least and the largest element."""
    if not x.numel():
        # as torch.histogram takes nothing for; it widens a range without width only if it found it
        return 0.0, 1.0
    low, high = (t.item() for t in x.aminmax())
    return low, high


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
    bins: Any,
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
    mesh = mesh_of(input, weight, bins)
    given = [_settled(t) for t in (input, weight) if t is not None]
    if not isinstance(given[0], ShardTensor):
        given[0] = wrap(given[0], Spec.whole(mesh, given[0].shape))
    spec, wanted = align(*given)
    x, *w = fit(mesh, (), *zip(given, wanted, strict=True))
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


def _is_cut(*xs: Any) -> bool:
    return any(axes_of(x._spec, range(x.ndim)) for x in xs if isinstance(x, ShardTensor))


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
    _eager("bincount", spec)
    x, *w = fit(spec.mesh, (), *zip(given, wanted, strict=True))
    low, high = _ends(wrap(x.long(), spec))
    if low < 0:
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    most = max(minlength, int(high) + 1 if input.numel() else 0)
    counts = torch.bincount(x, w[0] if w else None, most)
    if weights is not None:
        # of no elements torch counts in integers
        counts = counts.to(torch.float32 if weights.dtype is torch.float32 else torch.float64)
    return _total(counts, spec)


def _eager(op: str, spec: Spec) -> None:
    comm.check_values(comm.group(spec.mesh, spec.varying))
    if _torch.is_tracing():
        what = "the size of the result depends on values, so it cannot be compiled"
        raise UnsupportedOpError(f"{op} on {spec}: {what}; leave it out of st.compile")


# distinct values ---------------------------------------------------------------------------------


def _distinct(fn: Any, local: Tensor, d: int, group: str, counting: bool) -> Any:
    """fn gives (distinct rows, where each row went, counts); this of all ranks' rows."""
    own, places, times = fn(local)
    sizes = comm.counts(own.shape[d], own, group)
    start = sum(sizes[: comm.rank(group)])
    found, to, _ = fn(comm.gather(own, d, sizes, group))
    if counting:
        times = comm.gather(times, 0, sizes, group)
        times = times.new_zeros(found.shape[d]).index_add(0, to, times)
    return found, to[start : start + own.shape[d]][places], times


@rule("_unique2")
def unique(
    input: ShardTensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[ShardTensor, ...]:
    """The distinct values of all ranks, whole on each; the inverse is cut like the input."""
    x = reduced(input)
    axes = axes_of(x._spec, range(x.ndim))
    if not axes:
        found: Any = kernels.unique2(x._local, sorted, return_inverse, return_counts)
    else:
        group = comm.group(x._spec.mesh, axes)
        found = _distinct(
            lambda t: kernels.unique2(t, sorted, True, True), x._local.flatten(), 0, group,
            return_counts,
        )  # fmt: skip
    values, places, times = found
    n = x._spec.with_dims([Dim(len(values))])
    if not (return_inverse and places.numel() == x._local.numel()):
        inverse = wrap(places.new_zeros(0), x._spec.with_dims([Dim(0)]))
    else:
        inverse = wrap(places.view(x._spec.local_shape), x._spec)
    if not return_counts:
        times = times.new_zeros(0)
    return wrap(values, n), inverse, wrap(times, n.with_dims([Dim(len(times))]))


@rule("unique_dim")
def unique_dim(
    input: ShardTensor,
    dim: int,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[ShardTensor, ...]:
    """The distinct rows of all ranks, whole on each; the inverse is cut like the input."""
    x = reduced(input)
    if not x.ndim or not _is_cut(x):
        return _plain(kernels.functions.unique_dim, x, dim, sorted, return_inverse, return_counts)
    (d,) = over(dim, x.ndim)
    y = on_dim(x, d)
    rows, mesh = y._spec.dims[d], x._spec.mesh
    values, places, times = _distinct(
        lambda t: kernels.functions.unique_dim(t, d, sorted, True, True), y._local, d,
        comm.group(mesh, rows.axes), return_counts,
    )  # fmt: skip
    whole = y._spec.with_dims(whole_dims(values.shape))
    if not return_counts:
        times = times.new_zeros(0)
    return (
        wrap(values, whole),
        to_dims(wrap(places, whole.with_dims([rows])), [x._spec.dims[d]]),
        wrap(times, whole.with_dims([Dim(len(times))])),
    )


def _plain(fn: Any, x: ShardTensor, *args: Any) -> Any:
    """fn of a tensor that is the same on all ranks."""
    found = fn(x._local, *args)
    return tuple(wrap(f, x._spec.with_dims(whole_dims(f.shape))) for f in found)


@function_rule("unique_consecutive")
def unique_consecutive(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is Tensor.unique_consecutive:
        # returns what is asked for only, and calls the builtin
        return torch.unique_consecutive(*args, **kwargs)
    return _runs(*args, **kwargs)


def _runs(
    input: ShardTensor,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> tuple[ShardTensor, ...]:
    """Each rank's runs but those that began on an earlier rank; sharded along the runs."""
    x = reduced(input)
    if not x.numel() or not _is_cut(x):
        return _plain(kernels.functions.unique_consecutive, x, return_inverse, return_counts, dim)
    lead = next((i for i, n in enumerate(x.shape) if n > 1), 0)
    d = lead if dim is None else over(dim, x.ndim)[0]
    y = on_dim(x, d)
    _eager("unique_consecutive", y._spec)
    rows, local = y._spec.dims[d], y._local
    if dim is None:
        rows = rows.scaled(x.numel() // max(1, x.shape[d]))
        local, d = local.flatten(), 0
    group = comm.group(y._spec.mesh, rows.axes)
    values, places, times = Tensor.unique_consecutive(local, True, True, d)
    # the row before this rank's first, wherever it is
    edges = zip(rows.offsets, rows.sizes, strict=False)
    before = comm.window(
        local.detach(), d, rows.sizes, [(o - 1 if o and n else o, o) for o, n in edges], group
    )
    goes_on = before.shape[d] > 0 and bool((before == values.narrow(d, 0, 1)).all())
    n = values.shape[d] - goes_on
    sizes = comm.counts(n, values, group)
    first = sum(sizes[: comm.rank(group)]) - goes_on
    kept = Dim(sum(sizes), rows.axes, sizes)
    runs = first + torch.arange(values.shape[d], device=values.device)
    times = comm.put(times, runs, sizes, group)
    inverse = wrap(
        (places + first).view(y._spec.local_shape if dim is None else -1),
        y._spec if dim is None else y._spec.with_dims([rows]),
    )
    alone = y._spec.with_dims([kept])
    return (
        wrap(
            values.narrow(d, int(goes_on), n), alone if dim is None else y._spec.replace({d: kept})
        ),
        to_dims(inverse, x._spec.dims if dim is None else [x._spec.dims[d]]),
        wrap(times, alone),
    )
