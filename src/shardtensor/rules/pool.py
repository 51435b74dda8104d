"""Pooling over windows of rows, as for convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import cached
from ..redistribute import reduced
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from .overlap import Taps, overlapped, pays
from .windows import Ints, Reach, each, fetch, strided, trim

Reaches = tuple[tuple[int, Reach], ...]


class Stencil(NamedTuple):
    """One dim's kernel, stride, padding and dilation."""

    kernel: int
    stride: int
    before: int
    dilation: int

    @property
    def extent(self) -> int:
        """The rows from the first to the last that one output reads."""
        return (self.kernel - 1) * self.dilation + 1

    def outputs(self, size: int, ceil: bool) -> int:
        """How many outputs torch makes of `size` rows.

        With ceil a last partial output counts if it starts within the input or the padding before.
        """
        span = size + 2 * self.before - self.extent
        rows = (-(-span // self.stride) if ceil else span // self.stride) + 1
        if ceil and (rows - 1) * self.stride >= size + self.before:
            rows -= 1
        return rows


@cached
def _plan(
    spec: Spec, n: int, stencils: tuple[Stencil, ...], ceil: bool
) -> tuple[Spec, Reaches, tuple[int, ...]]:
    """(output spec, the rows to fetch in each sharded dim, the padding left to the local op)."""
    first = len(spec.dims) - n
    dims, reaches, left = list(spec.dims), [], []
    for i, s in enumerate(stencils):
        d = first + i
        if 2 * s.before > s.extent:
            raise RuntimeError(f"pad should be at most half of effective kernel size, but is {s}")
        rows = s.outputs(spec.dims[d].size, ceil)
        if rows <= 0:
            raise RuntimeError(f"pooling {spec} with {s}: output size is too small")
        if spec.dims[d].axes:
            reach = strided(spec.dims[d], s.kernel, s.stride, s.before, s.dilation, rows)
            dims[d] = reach.dim
            reaches.append((d, reach))
            left.append(0)
        else:
            dims[d] = Dim(rows)
            left.append(s.before)
    return spec.with_dims(dims), tuple(reaches), tuple(left)


def _stencils(
    n: int, kernel: Ints, stride: Ints | None, padding: Ints, dilation: Ints = 1
) -> tuple[Stencil, ...]:
    strides = kernel if stride is None or (not isinstance(stride, int) and not stride) else stride
    return tuple(
        Stencil(k, s, p, d)
        for k, s, p, d in zip(
            each(kernel, n), each(strides, n), each(padding, n), each(dilation, n),
            strict=True,
        )
    )  # fmt: skip


def _fetched(x: ShardTensor, reaches: Reaches, fill: float) -> Tensor:
    local = x._local
    for d, reach in reaches:
        local = fetch(local, d, x._spec, reach, fill)
    return local


def _over_rows(
    x: ShardTensor, reaches: Reaches, stencils: Sequence[Stencil], fill: float,
    op: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """op of this rank's window; in large shards rows travel while others are pooled."""
    if not reaches or not pays(x._spec):
        return op(_fetched(x, reaches, fill))
    (d, reach), *others = reaches
    s = stencils[d - x.ndim + len(stencils)]
    taps = Taps(s.stride, s.before, s.extent)
    return overlapped(_fetched(x, tuple(others), fill), d, x._spec, reach, taps, op, fill)


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

_MAX: dict[int, Callable[..., Any]] = {
    1: torch.max_pool1d_with_indices,
    2: torch._C._nn.max_pool2d_with_indices,
    3: torch._C._nn.max_pool3d_with_indices,
}


def _max_pool(
    n: int, input: ShardTensor, kernel: Ints, stride: Ints | None, padding: Ints, dilation: Ints,
    ceil_mode: bool, indices: bool,
) -> tuple[ShardTensor, ShardTensor | None]:  # fmt: skip
    x = reduced(input)
    stencils = _stencils(n, kernel, stride, padding, dilation)
    spec, reaches, left = _plan(x._spec, n, stencils, ceil_mode)
    low = float("-inf") if x.is_floating_point() else float(torch.iinfo(x.dtype).min)
    kernels, strides = [s.kernel for s in stencils], [s.stride for s in stencils]
    dilations = [s.dilation for s in stencils]

    def pool(local: Tensor) -> Any:
        return some_channels(
            local,
            x.ndim - n - 1,
            lambda some: _MAX[n](some, kernels, strides, left, dilations, ceil_mode),
        )

    if not indices:
        out = _over_rows(x, reaches, stencils, low, lambda local: pool(local)[0])
        for d, reach in reaches:
            out = trim(out, d, spec, reach)
        return wrap(out, spec), None
    local = _fetched(x, reaches, low)
    out, index = pool(local)
    index = _global_index(index, local.shape[-n:], x._spec, dilations, dict(reaches))
    for d, reach in reaches:
        out, index = trim(out, d, spec, reach), trim(index, d, spec, reach)
    return wrap(out, spec), wrap(index, spec)


def _global_index(
    index: Tensor, shape: Sequence[int], spec: Spec, dilations: Sequence[int],
    reaches: dict[int, Reach],
) -> Tensor:  # fmt: skip
    """Flat positions in the local windows as flat positions in the whole spatial volume."""
    if not reaches:
        return index
    n = len(dilations)
    first = len(spec.dims) - n
    found, step = torch.zeros_like(index), 1
    for i in reversed(range(n)):
        d = first + i
        start = reaches[d].windows[spec.index[d]][0] if d in reaches else 0
        at = index % shape[i] + start
        index = index // shape[i]
        if start < 0:
            # nothing in the window is above the fill: torch names its first row inside
            at = torch.where(at < 0, at % dilations[i], at)
        found = found + at * step
        step *= spec.dims[d].size
    return found


def _define_max_pool(n: int) -> None:
    @rule(f"max_pool{n}d")
    def max_pool(
        input: ShardTensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
        dilation: Ints = 1, ceil_mode: bool = False,
    ) -> ShardTensor:  # fmt: skip
        return _max_pool(n, input, kernel_size, stride, padding, dilation, ceil_mode, False)[0]

    @rule(f"max_pool{n}d_with_indices")
    def max_pool_with_indices(
        input: ShardTensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
        dilation: Ints = 1, ceil_mode: bool = False,
    ) -> tuple[ShardTensor, ShardTensor | None]:  # fmt: skip
        return _max_pool(n, input, kernel_size, stride, padding, dilation, ceil_mode, True)


# average -----------------------------------------------------------------------------------------


_AVG: dict[int, Callable[..., Tensor]] = {
    1: torch.avg_pool1d,
    2: torch._C._nn.avg_pool2d,
    3: torch._C._nn.avg_pool3d,
}


def _counts(s: Stencil, rows: range, size: int, include_pad: bool) -> list[int]:
    """How many rows each output averages over, as torch counts them."""
    found = []
    for j in rows:
        start = j * s.stride - s.before
        stop = min(start + s.kernel, size + s.before)
        found.append(stop - start if include_pad else max(0, min(stop, size) - max(start, 0)))
    return found


def _avg_pool(
    n: int, input: ShardTensor, kernel: Ints, stride: Ints | None, padding: Ints, ceil_mode: bool,
    count_include_pad: bool, divisor: int | None,
) -> ShardTensor:  # fmt: skip
    x = reduced(input)
    stencils = _stencils(n, kernel, stride, padding)
    spec, reaches, left = _plan(x._spec, n, stencils, ceil_mode)
    first = x.ndim - n
    kernels, strides = [s.kernel for s in stencils], [s.stride for s in stencils]
    if not reaches:
        over = () if n == 1 else (divisor,)
        out = some_channels(
            x._local,
            first - 1,
            lambda some: _AVG[n](some, kernels, strides, left, ceil_mode, count_include_pad, *over),
        )
        return wrap(out, spec)
    # torch's average over whole kernels, then corrected where fewer rows count
    by = divisor or (prod(kernels) if x.is_floating_point() else 1)
    out = _over_rows(
        x, reaches, stencils, 0.0,
        lambda local: some_channels(
            local,
            first - 1,
            lambda some: _kernel_average(some, n, kernels, strides, left, ceil_mode, by),
        ),
    )  # fmt: skip
    for i, s in enumerate(stencils if divisor is None else ()):
        d = first + i
        rows = range(spec.offset[d], spec.offset[d] + spec.local_shape[d])
        if not rows:
            continue
        counts = _counts(s, rows, x.shape[d], count_include_pad)
        shape = [-1] + [1] * (n - 1 - i)
        if not x.is_floating_point():
            whole = torch.tensor(counts, dtype=out.dtype, device=out.device)
            out = torch.div(out, whole.view(shape), rounding_mode="trunc")
        elif any(c != s.kernel for c in counts):
            more = torch.tensor([s.kernel / c for c in counts], dtype=out.dtype, device=out.device)
            out = out * more.view(shape)
    for d, reach in reaches:
        out = trim(out, d, spec, reach)
    return wrap(out, spec)


def _kernel_average(
    x: Tensor, n: int, kernels: list[int], strides: list[int], left: Sequence[int], ceil: bool,
    by: int,
) -> Tensor:  # fmt: skip
    """Sums over kernels divided by `by`; torch has no divisor in 1-D."""
    if n == 1:
        plane = x.unsqueeze(-2)
        return _AVG[2](plane, [1, *kernels], [1, *strides], [0, *left], ceil, True, by).squeeze(-2)
    return _AVG[n](x, kernels, strides, left, ceil, True, by)


def _define_avg_pool(n: int) -> None:
    @rule(f"avg_pool{n}d")
    def avg_pool(
        input: ShardTensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
        ceil_mode: bool = False, count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> ShardTensor:  # fmt: skip
        return _avg_pool(
            n, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )


for _n in (1, 2, 3):
    _define_max_pool(_n)
    _define_avg_pool(_n)
