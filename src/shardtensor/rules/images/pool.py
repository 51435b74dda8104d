"""Pooling over windows of rows, as for convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _torch
from ..._torch import kernels
from ...comm.constants import constant
from ...registry import rule
from ...spec import Spec
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import reduced
from ..flat import coordinates, move, positions
from ..sliding import fetched, plan, sliding
from ..windows import Ints, Reach, Stencil, stencils, trim


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
    strides = kernel if stride is None or (not isinstance(stride, int) and not stride) else stride
    found = {}
    for d, s in enumerate(stencils(n, kernel, strides, padding, dilation), x.ndim - n):
        if 2 * s.before > s.extent:
            raise RuntimeError(f"pad should be at most half of effective kernel size, but is {s}")
        found[d] = s._replace(ceil=ceil)
        if found[d].outputs(x.shape[d]) <= 0:
            raise RuntimeError(f"pooling {x._spec} with {s}: output size is too small")
    return found


def hold_to_dims(x: ShardTensor, n: int, op: Callable[..., Any], size: Any) -> None:
    """Raises torch's own error for an input of other than n dims, channels and perhaps a batch."""
    if x.ndim not in (n + 1, n + 2):
        op(x._local.new_zeros([1] * x.ndim), size)


def _kernels(found: dict[int, Stencil]) -> tuple[list[int], list[int]]:
    return [s.size for s in found.values()], [s.stride for s in found.values()]


def some_channels(local: Tensor, d: int, op: Callable[[Tensor], Any]) -> Any:
    """op(local), which torch refuses without channels: one of zeros then stands in for them."""
    if local.shape[d] or 0 in local.shape[d + 1 :]:
        return op(local)
    out = op(F.pad(local, [0, 0] * (local.ndim - 1 - d) + [0, 1]))
    if isinstance(out, tuple):
        return tuple(o.narrow(d, 0, 0) for o in out)
    return out.narrow(d, 0, 0)


def result_dtype(x: ShardTensor, n: int, op: Callable[[Tensor], Tensor]) -> torch.dtype:
    """The dtype that torch's op gives for x, which autocast may change."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return op(x._local.new_zeros([1, 1] + [2] * n)).dtype


# max ---------------------------------------------------------------------------------------------


def _max_pool3d(x: Tensor, *how: Any) -> Any:
    """As torch's, which takes a volume of one row without a batch for images, and refuses it."""
    if x.ndim != 4:
        return kernels.nn.max_pool3d_with_indices(x, *how)
    out, index = kernels.nn.max_pool3d_with_indices(x.unsqueeze(0), *how)
    return out.squeeze(0), index.squeeze(0)


_MAX: dict[int, Callable[..., Any]] = {
    1: torch.max_pool1d_with_indices,
    2: kernels.nn.max_pool2d_with_indices,
    3: _max_pool3d,
}


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
    hold_to_dims(input, n, _MAX[n], [1] * n)
    x = reduced(input)
    found = _stencils(x, n, kernel, stride, padding, dilation, ceil_mode)
    low = float("-inf") if x.is_floating_point() else float(torch.iinfo(x.dtype).min)
    kernels, strides = _kernels(found)
    dilations = [s.dilation for s in found.values()]

    def pool(local: Tensor, left: Sequence[int] = (0,) * n) -> Any:
        return some_channels(
            local,
            x.ndim - n - 1,
            lambda some: _MAX[n](some, kernels, strides, left, dilations, ceil_mode),
        )

    if not indices:
        return sliding(x, found, lambda *rows: pool(*rows)[0], fill=low, image=n > 1), None
    dims, reaches, left, _ = plan(x._spec, tuple(found.items()))
    local = fetched(x._local, x._spec, reaches, low)
    out, index = pool(local, left)
    shape, along = local.shape[-n:], {d: reach for d, _, reach in reaches}
    del local
    index = _global_index(index, shape, x._spec, dilations, along, _torch.differentiated(out))
    for d, _, reach in reaches:
        out, index = trim(out, d, x._spec, reach), trim(index, d, x._spec, reach)
    spec = x._spec.with_dims([*x._spec.dims[: x.ndim - n], *(dim for _, dim in dims)])
    if n == 1:
        return wrap(out, spec), wrap(index, spec)
    return layout.like_image(wrap(out, spec), x), layout.like_image(wrap(index, spec), x)


def _global_index(
    index: Tensor,
    shape: Sequence[int],
    spec: Spec,
    dilations: Sequence[int],
    reaches: dict[int, Reach],
    kept: bool,
) -> Tensor:
    """Flat positions in the local windows as flat positions in the whole spatial volume.

    kept: whether backward needs the index as it is.
    """
    if not reaches:
        return index
    first = len(spec.dims) - len(dilations)
    sizes, at = spec.shape[first:], spec.index[first:]
    starts = [reaches[d].windows[i][0] if d in reaches else 0 for d, i in enumerate(at, first)]
    # results whose windows may begin outside
    outer = [(d, min(-start, index.shape[d])) for d, start in enumerate(starts, first) if start < 0]
    inside = [_inside(index.narrow(d, 0, n), shape, starts, sizes, dilations) for d, n in outer]
    index = move(index.clone() if kept else index, shape, starts, sizes)
    for (d, n), found in zip(outer, inside, strict=True):
        index.narrow(d, 0, n).copy_(found)
    return index


def _inside(
    index: Tensor,
    shape: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
    dilations: Sequence[int],
) -> Tensor:
    """As `move`; where nothing in a window is above the fill torch names its first row inside."""
    found = []
    for at, start, dilation in zip(coordinates(index, shape), starts, dilations, strict=True):
        at = at + start
        found.append(torch.where(at < 0, at % dilation, at) if start < 0 else at)
    return positions(found, sizes)


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
    first = x.ndim - n
    kernels, strides = _kernels(found)
    cut = any(dim.axes for dim in x._spec.dims[first:])
    # torch's average over whole kernels, then corrected where fewer rows count
    by = divisor or (prod(kernels) if x.is_floating_point() else 1)
    over = () if n == 1 else (divisor,)

    def average(local: Tensor, left: Sequence[int] = (0,) * n) -> Tensor:
        if cut:
            return _kernel_average(local, n, kernels, strides, left, ceil_mode, by)
        return _AVG[n](local, kernels, strides, left, ceil_mode, count_include_pad, *over)

    def pool(local: Tensor, *left: Sequence[int]) -> Tensor:
        return some_channels(local, first - 1, lambda some: average(some, *left))

    pooled = sliding(x, found, pool, image=n == 2)
    if not cut or divisor is not None:
        return pooled
    out, spec = pooled._local, pooled._spec
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
    return wrap(out, spec, pooled._strides)


def _kernel_average(
    x: Tensor,
    n: int,
    kernels: list[int],
    strides: list[int],
    left: Sequence[int],
    ceil: bool,
    by: int,
) -> Tensor:
    """Sums over kernels divided by `by`; torch has no divisor in 1-D."""
    if n == 1:
        plane = x.unsqueeze(-2)
        return _AVG[2](plane, [1, *kernels], [1, *strides], [0, *left], ceil, True, by).squeeze(-2)
    return _AVG[n](x, kernels, strides, left, ceil, True, by)


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
