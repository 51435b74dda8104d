"""Pooling over windows of rows, as for convolution."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _torch
from ..._torch import kernels
from ...cache import cached
from ...comm.constants import constant
from ...cuts import pairs, table
from ...registry import rule
from ...spec import Spec
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import reduced
from ..flat import move
from ..overlap import pays
from ..sliding import Reads, fetched, plan, sliding
from ..windows import Ints, Stencil, reach_of, stencils, trim
from .pool_kernels import How, pooled, some_channels
from .pool_strips import laid, pool_strips

# types of settings by which stencils are found as they are
_KINDS = frozenset({int, tuple})


def _stencils(
    x: ShardTensor,
    n: int,
    kernel: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil: bool,
) -> dict[int, Stencil]:
    """The stencil of each of the last n dims; raises what torch raises."""
    given: Any = kernel, kernel if stride is None else stride, padding, dilation
    if not _KINDS.issuperset(map(type, given)):
        given = [v if isinstance(v, int) else tuple(v) for v in given]
    kernel, strides, padding, dilation = given
    return _found(x._spec, n, kernel, strides, padding, dilation, ceil)


@cached
def _found(
    spec: Spec, n: int, kernel: Ints, strides: Ints, padding: Ints, dilation: Ints, ceil: bool
) -> dict[int, Stencil]:
    found = {}
    every = stencils(n, kernel, kernel if strides == () else strides, padding, dilation)
    for d, s in enumerate(every, len(spec.dims) - n):
        if 2 * s.before > s.extent:
            raise RuntimeError(f"pad should be at most half of effective kernel size, but is {s}")
        found[d] = s._replace(ceil=ceil)
        if found[d].outputs(spec.shape[d]) <= 0:
            raise RuntimeError(f"pooling {spec} with {s}: output size is too small")
    return found


def hold_to_dims(x: ShardTensor, n: int, op: Callable[..., Any], size: Any) -> None:
    """Raises torch's own error for an input of other than n dims, channels and perhaps a batch."""
    if x.ndim not in (n + 1, n + 2):
        op(x._local.new_zeros([1] * x.ndim), size)


def result_dtype(x: ShardTensor, n: int, op: Callable[[Tensor], Tensor]) -> torch.dtype:
    """The dtype that torch's op gives for x, which autocast may change."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return op(x._local.new_zeros([1, 1] + [2] * n)).dtype


def _pooled(
    x: ShardTensor, found: dict[int, Stencil], fill: float, by: int | None, places: bool = False
) -> tuple[ShardTensor, ShardTensor | None]:
    """(the largest of windows, or their sums over `by`; where asked for places in the whole)."""
    spec, n, known = x._spec, len(found), tuple(found.items())
    reads, how, of, padded = _way(spec, known, by)
    here = laid(spec, known, reads, how) if reads and pays(spec) else None
    index = None
    if here is not None:
        again = lambda local: _windowed(local, spec, reads, how, fill)[0]  # noqa: E731
        out, index = pool_strips(x._local, here, fill, places, again)
    elif places or padded:
        out, index = _windowed(x._local, spec, reads, how, fill, places)
    else:
        return sliding(
            x, found, lambda rows, *_: pooled(rows, how)[0], fill=fill, image=n > 1
        ), None
    every = [None if y is None else wrap(y, of) for y in (out, index)]
    if n > 1:
        every = [None if y is None else layout.like_image(y, x) for y in every]
    return every[0], every[1]  # type: ignore[return-value]


@cached
def _way(
    spec: Spec, stencils: tuple[tuple[int, Stencil], ...], by: int | None
) -> tuple[Reads, How, Spec, bool]:
    """(what is read, how it is pooled, the result's spec, whether largest ones are padded)."""
    dims, reads, left, _ = plan(spec, stencils)
    every = [s for _, s in stencils]
    sizes = zip(*[(s.size, s.stride, s.dilation) for s in every], strict=True)
    kernel, stride, dilation = sizes
    of = spec.with_dims([*spec.dims[: -len(every)], *(dim for _, dim in dims)])
    padded = by is None and any(s.before for s in every)
    return reads, How(kernel, stride, left, dilation, every[0].ceil, by), of, padded


def _windowed(
    local: Tensor, spec: Spec, reads: Reads, how: How, fill: float, places: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Of a copy with the rows of others that windows read; differentiable any number of times.

    Of the largest the kernel itself pads before the first row: where nothing in a window is above
    the fill it names the first row inside.
    """
    reads, outside = _inside(spec, reads) if how.by is None else (reads, (0,) * len(reads))
    rows = fetched(local, spec, reads, fill)
    n = len(how.kernel)
    first, shape, starts = len(spec.dims) - n, rows.shape[-n:], list(spec.offset[-n:])
    padding = list(how.padding)
    for (d, _, reach), pad in zip(reads, outside, strict=True):
        padding[d - first] = pad
        starts[d - first] = reach.windows[spec.index[d]][0]
    out, index = pooled(rows, how._replace(padding=tuple(padding)))
    del rows
    if places and reads:
        # backward needs its own as they are
        index = index.clone() if _torch.differentiated(out) else index
        index = move(index, shape, starts, spec.shape[-n:])
    for d, _, reach in reads:
        out = trim(out, d, spec, reach, 0)
        index = trim(index, d, spec, reach, 0) if places else None
    return out, index if places else None


@cached
def _inside(spec: Spec, reads: Reads) -> tuple[Reads, tuple[int, ...]]:
    """(what is read from the first row on, how many rows of this rank's windows lie before it)."""
    found, outside = [], []
    for d, s, reach in reads:
        starts, stops = table(reach.windows).T
        # but of a rank without outputs, which are made of fill
        clipped = np.where(np.diff(reach.dim.edges) > 0, starts.clip(0), starts)
        windows = pairs(clipped, stops)
        found.append((d, s, reach_of(spec.dims[d], reach.dim.offsets, windows)))
        outside.append(int((clipped - starts)[spec.index[d]]))
    return tuple(found), tuple(outside)


# max ---------------------------------------------------------------------------------------------


def _max_pool(
    n: int,
    input: ShardTensor,
    kernel: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    indices: bool,
) -> tuple[ShardTensor, ShardTensor | None]:
    """(largest values, their flat places where asked for) of windows."""
    hold_to_dims(input, n, getattr(F, f"max_pool{n}d"), [1] * n)
    x = reduced(input)
    found = _stencils(x, n, kernel, stride, padding, dilation, ceil_mode)
    low = float("-inf") if x.dtype.is_floating_point else float(torch.iinfo(x.dtype).min)
    return _pooled(x, found, low, None, indices)


def _define_max_pool(n: int) -> None:
    """The rules of max pools over n dims."""

    @rule(f"max_pool{n}d")
    def max_pool(
        input: ShardTensor,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
    ) -> ShardTensor:
        return _max_pool(n, input, kernel_size, stride, padding, dilation, ceil_mode, False)[0]

    @rule(f"max_pool{n}d_with_indices")
    def max_pool_with_indices(
        input: ShardTensor,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        dilation: Ints = 1,
        ceil_mode: bool = False,
    ) -> tuple[ShardTensor, ShardTensor | None]:
        return _max_pool(n, input, kernel_size, stride, padding, dilation, ceil_mode, True)


# average -----------------------------------------------------------------------------------------


_AVG: dict[int, Callable[..., Tensor]] = {
    1: torch.avg_pool1d,
    2: kernels.nn.avg_pool2d,
    3: kernels.nn.avg_pool3d,
}


def _counts(s: Stencil, rows: range, size: int, include_pad: bool) -> list[int]:
    """How many rows each output averages over, as torch counts them."""
    found = []
    for j in rows:
        start = j * s.stride - s.before
        stop = min(start + s.size, size + s.before)
        found.append(stop - start if include_pad else max(0, min(stop, size) - max(start, 0)))
    return found


def _avg_pool(
    n: int,
    input: ShardTensor,
    kernel: Ints,
    stride: Ints | None,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> ShardTensor:
    """Means of windows; those at the edges count what torch counts."""
    if divisor == 0:
        raise RuntimeError("divisor must be not zero")
    hold_to_dims(input, n, _AVG[n], [1] * n)
    x = reduced(input)
    found = _stencils(x, n, kernel, stride, padding, 1, ceil_mode)
    if not any(x._spec.dims[d].axes for d in found):
        sizes, strides, left = zip(
            *[(s.size, s.stride, s.before) for s in found.values()], strict=True
        )
        over = () if n == 1 else (divisor,)

        def average(local: Tensor, *_: Any) -> Tensor:
            return _AVG[n](local, sizes, strides, left, ceil_mode, count_include_pad, *over)

        return sliding(
            x, found, lambda rows, *_: some_channels(rows, x.ndim - n - 1, average), image=n == 2
        )
    # sums of whole kernels, then corrected where fewer rows count
    area = prod(s.size for s in found.values()) if x.is_floating_point() else 1
    means, _ = _pooled(x, found, 0.0, divisor or area)
    if divisor is not None:
        return means
    out, spec = means._local, means._spec
    for d, s in found.items():
        rows = range(spec.offset[d], spec.offset[d] + spec.local_shape[d])
        if not rows:
            continue
        counts = _counts(s, rows, x.shape[d], count_include_pad)
        shape = [-1] + [1] * (x.ndim - 1 - d)
        if not x.is_floating_point():
            whole = constant(tuple(counts), out.dtype, out)
            out = torch.div(out, whole.view(shape), rounding_mode="trunc")
        elif any(c != s.size for c in counts):
            more = constant(tuple([s.size / c for c in counts]), out.dtype, out)
            out = out * more.view(shape)
    return wrap(out, spec, means._strides)


def _define_avg_pool(n: int) -> None:
    @rule(f"avg_pool{n}d")
    def avg_pool(
        input: ShardTensor,
        kernel_size: Ints,
        stride: Ints | None = None,
        padding: Ints = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> ShardTensor:
        return _avg_pool(
            n, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )


for _n in (1, 2, 3):
    _define_max_pool(_n)
    _define_avg_pool(_n)
