"""Pooling: windows as for convolution; irregular adaptive bins move the shards to the channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import cached
from ..redistribute import reduced, to_dims
from ..registry import rule
from ..spec import Dim, Spec, nested_chunk_sizes
from ..tensor import ShardTensor, wrap
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


def _some_channels(local: Tensor, d: int, op: Callable[[Tensor], Any]) -> Any:
    """op(local), which torch refuses without channels: one of zeros then stands in for them."""
    if local.shape[d] or 0 in local.shape[d + 1 :]:
        return op(local)
    out = op(F.pad(local, [0, 0] * (local.ndim - 1 - d) + [0, 1]))
    if isinstance(out, tuple):
        return tuple(o.narrow(d, 0, 0) for o in out)
    return out.narrow(d, 0, 0)


# max ---------------------------------------------------------------------------------------------

_MAX: dict[int, Callable[..., Any]] = {
    1: torch.max_pool1d_with_indices,
    2: torch._C._nn.max_pool2d_with_indices,
    3: torch._C._nn.max_pool3d_with_indices,
}


def _max_pool(
    n: int, input: ShardTensor, kernel: Ints, stride: Ints | None, padding: Ints, dilation: Ints,
    ceil_mode: bool,
) -> tuple[ShardTensor, ShardTensor]:  # fmt: skip
    x = reduced(input)
    stencils = _stencils(n, kernel, stride, padding, dilation)
    spec, reaches, left = _plan(x._spec, n, stencils, ceil_mode)
    low = float("-inf") if x.is_floating_point() else float(torch.iinfo(x.dtype).min)
    local = _fetched(x, reaches, low)
    kernels, strides = [s.kernel for s in stencils], [s.stride for s in stencils]
    dilations = [s.dilation for s in stencils]
    out, index = _some_channels(
        local,
        x.ndim - n - 1,
        lambda some: _MAX[n](some, kernels, strides, left, dilations, ceil_mode),
    )
    index = _global_index(index, local.shape[-n:], x._spec, n, dict(reaches))
    for d, reach in reaches:
        out, index = trim(out, d, spec, reach), trim(index, d, spec, reach)
    return wrap(out, spec), wrap(index, spec)


def _global_index(
    index: Tensor, shape: Sequence[int], spec: Spec, n: int, reaches: dict[int, Reach]
) -> Tensor:
    """Flat positions in the local windows as flat positions in the whole spatial volume."""
    if not reaches:
        return index
    first = len(spec.dims) - n
    found, step = torch.zeros_like(index), 1
    for i in reversed(range(n)):
        d = first + i
        at = index % shape[i]
        index = index // shape[i]
        start = reaches[d].windows[spec.index[d]][0] if d in reaches else 0
        found = found + (at + start) * step
        step *= spec.dims[d].size
    return found


def _define_max_pool(n: int) -> None:
    @rule(f"max_pool{n}d")
    def max_pool(
        input: ShardTensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
        dilation: Ints = 1, ceil_mode: bool = False,
    ) -> ShardTensor:  # fmt: skip
        return _max_pool(n, input, kernel_size, stride, padding, dilation, ceil_mode)[0]

    @rule(f"max_pool{n}d_with_indices")
    def max_pool_with_indices(
        input: ShardTensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
        dilation: Ints = 1, ceil_mode: bool = False,
    ) -> tuple[ShardTensor, ShardTensor]:  # fmt: skip
        return _max_pool(n, input, kernel_size, stride, padding, dilation, ceil_mode)


# average -----------------------------------------------------------------------------------------


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
    local = _fetched(x, reaches, 0.0)
    first = x.ndim - n
    regular = not ceil_mode and all(s.before == 0 for s in stencils)
    pool = F.avg_pool3d if n == 3 else F.avg_pool2d
    kernels, strides = [s.kernel for s in stencils], [s.stride for s in stencils]
    pads = list(left)
    if n == 1:
        local, kernels, strides, pads = (
            local.unsqueeze(-2),
            [1, *kernels],
            [1, *strides],
            [0, *pads],
        )
    by = divisor or (prod(s.kernel for s in stencils) if regular else 1)
    out = pool(local, kernels, strides, pads, ceil_mode, True, by)
    out = out.squeeze(-2) if n == 1 else out
    if divisor is None and not regular:
        for i, s in enumerate(stencils):
            d = first + i
            rows = range(spec.offset[d], spec.offset[d] + max(spec.local_shape[d], 1))
            counts = _counts(s, rows, x.shape[d], count_include_pad)
            shape = [-1] + [1] * (n - 1 - i)
            out = out / torch.tensor(counts, dtype=out.dtype, device=out.device).view(shape)
    for d, reach in reaches:
        out = trim(out, d, spec, reach)
    return wrap(out, spec)


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


# adaptive ----------------------------------------------------------------------------------------


def _targets(x: ShardTensor, n: int, output_size: Any) -> list[int]:
    sizes = [output_size] * n if isinstance(output_size, int | None) else list(output_size)
    sizes = sizes * n if len(sizes) == 1 else sizes
    return [x.shape[x.ndim - n + i] if m is None else int(m) for i, m in enumerate(sizes)]


def _on_channels(x: ShardTensor, n: int) -> ShardTensor:
    """The sharding of spatial dims moved to the channels, or given up if those are sharded."""
    first = x.ndim - n
    dims = list(x._spec.dims)
    axes = tuple(sorted(a for d in dims[first:] for a in d.axes))
    dims[first:] = [Dim(d.size) for d in dims[first:]]
    if not dims[first - 1].axes:
        size = dims[first - 1].size
        sizes = nested_chunk_sizes(size, [x._spec.mesh.size(a) for a in axes])
        dims[first - 1] = Dim(size, axes, sizes)
    return to_dims(x, dims)


def _adaptive(
    x: ShardTensor, n: int, output_size: Any, regular: Callable[..., Any], op: Callable[..., Any]
) -> Any:
    """regular(x, kernel) where bins of sharded dims are equal, else op on the channels' shards."""
    first = x.ndim - n
    targets = _targets(x, n, output_size)
    sharded = [i for i in range(n) if x._spec.dims[first + i].axes]
    if all(m and x.shape[first + i] % m == 0 for i, m in enumerate(targets)) and sharded:
        return regular(x, [x.shape[first + i] // m for i, m in enumerate(targets)])
    if sharded:
        x = _on_channels(x, n)
    dims = [*x._spec.dims[:first], *(Dim(m) for m in targets)]
    out = _some_channels(x._local, first - 1, lambda local: op(local, targets))
    spec = x._spec.with_dims(dims)
    return tuple(wrap(o, spec) for o in out) if isinstance(out, tuple) else wrap(out, spec)


_ADAPTIVE_MAX: dict[int, Callable[..., Any]] = {
    1: torch.adaptive_max_pool1d,
    2: torch._C._nn.adaptive_max_pool2d,
    3: torch._C._nn.adaptive_max_pool3d,
}
_ADAPTIVE_AVG: dict[int, Callable[..., Any]] = {
    1: torch.adaptive_avg_pool1d,
    2: torch._C._nn.adaptive_avg_pool2d,
    3: torch._C._nn.adaptive_avg_pool3d,
}


def _define_adaptive(n: int) -> None:
    @rule(f"adaptive_avg_pool{n}d")
    def adaptive_avg_pool(input: ShardTensor, output_size: Any) -> Any:
        x = reduced(input)
        if all(m == 1 for m in _targets(x, n, output_size)):
            return x.mean(tuple(range(x.ndim - n, x.ndim)), keepdim=True)

        def equal_bins(x: ShardTensor, kernel: list[int]) -> ShardTensor:
            return _avg_pool(n, x, kernel, kernel, 0, False, True, None)

        return _adaptive(x, n, output_size, equal_bins, _ADAPTIVE_AVG[n])

    @rule(f"adaptive_max_pool{n}d")
    def adaptive_max_pool(input: ShardTensor, output_size: Any) -> Any:
        x = reduced(input)

        def equal_bins(x: ShardTensor, kernel: list[int]) -> Any:
            if any(k * len(d.sizes) > 2 * d.size for k, d in zip(
                kernel, x._spec.dims[-n:], strict=True)):  # fmt: skip
                # few bins: one rank would fetch most of the dim
                return _adaptive_max_on_channels(n, x, kernel)
            return _max_pool(n, x, kernel, kernel, 0, 1, False)

        return _adaptive(x, n, output_size, equal_bins, _ADAPTIVE_MAX[n])


def _adaptive_max_on_channels(n: int, x: ShardTensor, kernel: list[int]) -> Any:
    return _max_pool(n, _on_channels(x, n), kernel, kernel, 0, 1, False)


for _n in (1, 2, 3):
    _define_max_pool(_n)
    _define_avg_pool(_n)
    _define_adaptive(_n)
