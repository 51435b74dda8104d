"""Distinct values and runs: those of all ranks, whole on each, or where they lie.

Distinct values come together from each rank's own, and are the same on all ranks; where each
element went stays sharded like the input. Runs stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import comm
from ..._torch import kernels
from ...registry import rule
from ...spec import Dim, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.recut import on_dim
from ...tensor.redistribute import reduced, to_dims
from ..pointwise import function_rule
from ..reduce import axes_of, over
from .counting import eager


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
    if not x.ndim or not axes_of(x._spec, range(x.ndim)):
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
    if not x.numel() or not axes_of(x._spec, range(x.ndim)):
        return _plain(kernels.functions.unique_consecutive, x, return_inverse, return_counts, dim)
    lead = next((i for i, n in enumerate(x.shape) if n > 1), 0)
    d = lead if dim is None else over(dim, x.ndim)[0]
    y = on_dim(x, d)
    eager("unique_consecutive", y._spec)
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
