"""Adaptive pooling: each rank reduces its own rows of every bin; only these partial results travel.

Output j of m pools the bin [floor(j * n / m), ceil((j + 1) * n / m)) of n rows. Where shards end
between bins torch's op runs on each shard. Else every rank sums (or takes the maximum of) its part
of each bin that it has rows of, and the bins that lie on several ranks are put together: at most
one row of results for each boundary between ranks. The output is cut like the input, but is
replicated where it has fewer rows than there are shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import comm
from ..._torch import kernels
from ...cache import cached
from ...comm.constants import constant
from ...comm.define import run
from ...comm.ops import window_add_op
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import reduced
from .. import flat
from ..empty import stock
from .pool import hold_to_dims, result_dtype
from .pool_kernels import some_channels

_MAX: dict[int, Callable[..., Any]] = {
    1: torch.adaptive_max_pool1d,
    2: kernels.nn.adaptive_max_pool2d,
    3: kernels.nn.adaptive_max_pool3d,
}
# the kernels themselves: above them, torch takes the mean where a shard has one row of results
_AVG: dict[int, Callable[..., Any]] = {
    1: lambda x, m: torch.ops.aten._adaptive_avg_pool2d(x.unsqueeze(-2), (1, *m)).squeeze(-2),
    2: torch.ops.aten._adaptive_avg_pool2d,
    3: torch.ops.aten._adaptive_avg_pool3d,
}


class Bins(NamedTuple):
    """How the bins of one sharded dim lie over the ranks.

    out: the output dim.
    spans: for every rank the outputs [first, last) whose bins it has rows of.
    """

    out: Dim
    spans: tuple[tuple[int, int], ...]

    def window(self, rank: int) -> tuple[int, int]:
        """Of all ranks' partial results in a row, those that belong to the outputs of a rank.

        A bin on several ranks has its parts side by side, because spans ascend.
        """
        order = self.order
        a, b = self.out.spans[rank if self.out.axes else 0]
        return sum(j < a for j in order), sum(j < b for j in order)

    @property
    def order(self) -> list[int]:
        """The output that each of all ranks' partial results belongs to."""
        return [j for a, b in self.spans for j in range(a, b)]


def _bin(j: int, n: int, m: int) -> tuple[int, int]:
    return j * n // m, -(-(j + 1) * n // m)


@cached
def _bins(dim: Dim, m: int) -> Bins:
    n = dim.size
    spans = [((a * m) // n, -(-(b * m) // n)) if a < b else (0, 0) for a, b in dim.spans]
    if m < len(dim.sizes):
        return Bins(Dim(m), tuple(spans))
    return Bins(dim.cut_at([round(o * m / n) for o in dim.offsets]), tuple(spans))


@cached
def _own(dim: Dim, m: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The local rows [start, stop) of every bin that a rank has rows of."""
    low, high = dim.spans[rank]
    return tuple(
        (max(low, start) - low, min(high, stop) - low)
        for start, stop in (_bin(j, dim.size, m) for j in range(*_bins(dim, m).spans[rank]))
    )


def _targets(x: ShardTensor, n: int, output_size: Any) -> list[int]:
    sizes = [output_size] * n if isinstance(output_size, int | None) else list(output_size)
    sizes = sizes * n if len(sizes) == 1 else sizes
    if len(sizes) != n:
        raise ValueError(f"adaptive pooling over {n} dims with output size {tuple(sizes)}")
    return [x.shape[x.ndim - n + i] if m is None else int(m) for i, m in enumerate(sizes)]


def _split_up(
    x: ShardTensor, n: int, targets: Sequence[int]
) -> tuple[Spec, list[int], dict[int, Bins]]:
    """(the output spec, the local targets, the plan of each dim whose bins lie across shards).

    A dim with a plan keeps its rows in the local targets.
    """
    spec, first = x._spec, x.ndim - n
    dims, here, plans = list(spec.dims), list(targets), {}
    for i, m in enumerate(targets):
        dim = spec.dims[first + i]
        if dim.size == 0 or m < 0:
            raise RuntimeError(f"adaptive pooling of {spec} to {tuple(targets)}: a size is zero")
        if not dim.axes:
            dims[first + i] = Dim(m)
        elif all(o * m % dim.size == 0 for o in dim.offsets):
            dims[first + i] = dim.scaled(m, dim.size)
            here[i] = dims[first + i].sizes[spec.index[first + i]]
        else:
            plans[first + i] = _bins(dim, m)
            dims[first + i] = plans[first + i].out
            here[i] = spec.local_shape[first + i]
    return spec.with_dims(dims), here, plans


def _name(x: ShardTensor, d: int) -> str:
    return comm.along(x._spec, d)


# average -----------------------------------------------------------------------------------------


def _sums(local: Tensor, d: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The sum over each of several ranges of rows, which ascend and may share rows.

    Adds up every row once, in single precision at least, as torch does.
    """
    wide = torch.float64 if local.dtype is torch.float64 else torch.float32
    if not ranges:
        return local.to(wide).narrow(d, 0, 0)
    edges = sorted({e for pair in ranges for e in pair})
    parts = local.split([b - a for a, b in pairwise(edges)], d)
    sums = torch.stack([p.sum(d, dtype=wide) for p in parts], d)
    found = [sums.narrow(d, edges.index(a), edges.index(b) - edges.index(a)) for a, b in ranges]
    if list(ranges) == list(pairwise(edges)):
        return sums
    return torch.cat([f.sum(d, keepdim=True) for f in found], d)


def _averages(x: ShardTensor, n: int, targets: list[int]) -> ShardTensor:
    """Means over windows: each rank adds its rows of them, and gets the others' sums."""
    spec, here, plans = _split_up(x, n, targets)
    first = x.ndim - n
    local = x._local
    dtype = result_dtype(x, n, lambda some: _AVG[n](some, [1] * n))
    for d, plan in plans.items():
        ranges = _own(x._spec.dims[d], plan.out.size, x._spec.index[d])
        local = _sums(local, d, ranges)
        here[d - first] = len(ranges)
    if any(x.shape[first + i] != m for i, m in enumerate(targets) if first + i not in plans):
        local = _local(local, n, here, _AVG[n])
    for d, plan in plans.items():
        m, size, i = plan.out.size, x.shape[d], x._spec.index[d]
        if plan.out.axes:
            starts, stops = [a for a, _ in plan.spans], [b for _, b in plan.spans]
            name = _name(x, d)
            local = run(window_add_op, local, d, plan.out.sizes, starts, stops, False, name)
        else:
            a, b = plan.spans[i]
            local = F.pad(local, [0, 0] * (local.ndim - 1 - d) + [a, m - b])
            local = comm.reduce(local, _name(x, d))
        rows = range(*spec.spans[d])
        counts = [b - a for a, b in (_bin(j, size, m) for j in rows)]
        by = constant(tuple(counts), local.dtype, local)
        local = local / by.view([-1] + [1] * (local.ndim - 1 - d))
    return _as_image(wrap(local.to(dtype), spec), x, n)


def _as_image(out: ShardTensor, x: ShardTensor, n: int) -> ShardTensor:
    """As torch gives it: of images, not of volumes, the channels stay last."""
    return layout.like_image(out, x) if n == 2 else out


def _local(local: Tensor, n: int, here: list[int], op: Callable[..., Any]) -> Any:
    """Torch's op on the local tensor, which it refuses without rows."""
    target = here if local.numel() else [max(1, m) for m in here]
    return stock(
        lambda z: some_channels(z, z.ndim - n - 1, lambda some: op(some, target)),
        [*local.shape[:-n], *here], local,
    )  # fmt: skip


def _nothing(x: ShardTensor, n: int, targets: list[int]) -> ShardTensor:
    """A result without elements, of which torch gives no gradient: on ranks with rows it raises."""
    spec, _, _ = _split_up(x, n, targets)
    return wrap(x._local.flatten()[:0].reshape(spec.local_shape), spec)


# max ---------------------------------------------------------------------------------------------


def _maxima(x: ShardTensor, n: int, targets: list[int]) -> tuple[ShardTensor, ShardTensor]:
    """(largest values of windows, their flat places): each rank's own, then the best of them."""
    spec, here, plans = _split_up(x, n, targets)
    first = x.ndim - n
    index = _positions(x._local.detach(), x._spec, n, here, plans)
    values = x._local.flatten(first).gather(-1, index.flatten(first)).view(index.shape)
    index = _whole_positions(index, x._spec, n)
    for d, plan in plans.items():
        sizes = [b - a for a, b in plan.spans]
        i, name = x._spec.index[d], _name(x, d)
        if plan.out.axes:
            windows = [plan.window(r) for r in range(len(sizes))]
            start, stop = windows[i]
            values = comm.window(values, d, sizes, windows, name)
            index = comm.window(index, d, sizes, windows, name)
        else:
            start, stop = 0, sum(sizes)
            values = comm.gather(values, d, sizes, name)
            index = comm.gather(index, d, sizes, name)
        values, index = _merged(values, index, d, plan.order[start:stop])
    return _as_image(wrap(values, spec), x, n), _as_image(wrap(index, spec), x, n)


def _positions(
    local: Tensor, spec: Spec, n: int, here: list[int], plans: dict[int, Bins]
) -> Tensor:
    """Flat positions, in the local volume, of the maxima of this rank's part of every bin."""
    first = local.ndim - n
    shape = local.shape[first:]
    if not local.numel():
        found = [
            len(_own(spec.dims[d], plans[d].out.size, spec.index[d])) if d in plans else m
            for d, m in enumerate(here, first)
        ]
        return local.new_zeros([*local.shape[:first], *found], dtype=torch.int64)
    # the last dim first: then of equal maxima the first in memory order wins, as in torch
    values, index = local, torch.arange(shape.numel(), device=local.device).view(shape)
    index = index.expand(local.shape)
    for i in reversed(range(n)):
        d, target = first + i, list(values.shape[first:])
        if d in plans:
            target[i] = 1
            parts = [
                _pooled(values.narrow(d, a, b - a), index.narrow(d, a, b - a), n, target)
                for a, b in _own(spec.dims[d], plans[d].out.size, spec.index[d])
            ]
            values, index = (torch.cat(p, d) for p in zip(*parts, strict=True))
        elif target[i] != here[i]:
            target[i] = here[i]
            values, index = _pooled(values, index, n, target)
    return index


def _pooled(values: Tensor, index: Tensor, n: int, target: list[int]) -> tuple[Tensor, Tensor]:
    """torch's adaptive maxima of values, and the entries of index that belong to them."""
    out, at = _MAX[n](values, target)
    first = values.ndim - n
    return out, index.flatten(first).gather(-1, at.flatten(first)).view(at.shape)


def _whole_positions(index: Tensor, spec: Spec, n: int) -> Tensor:
    """Flat positions in the local volume as positions in the whole one."""
    first = len(spec.dims) - n
    return flat.whole(index, [max(1, m) for m in spec.local_shape[first:]], spec, first)


def _merged(values: Tensor, index: Tensor, d: int, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The best of the rows along d that belong to the same output."""
    starts = [i for i, j in enumerate(order) if i == 0 or order[i - 1] != j]
    lengths = [b - a for a, b in pairwise([*starts, len(order)])]
    if max(lengths, default=1) == 1:
        return values, index
    shape = [-1] + [1] * (values.ndim - 1 - d)
    known = values.detach()
    best = _rows(values, starts).view(shape)
    best = best.expand([*values.shape[:d], len(starts), *values.shape[d + 1 :]])
    for t in range(1, max(lengths)):
        at = [a + min(t, n - 1) for a, n in zip(starts, lengths, strict=True)]
        other = _rows(values, at).view(shape).expand_as(best)
        old, new = known.gather(d, best), known.gather(d, other)
        earlier = index.gather(d, other) < index.gather(d, best)
        nan = old.isnan()
        # torch: the first of equal maxima, the last NaN
        better = torch.where(
            new.isnan(), ~nan | ~earlier, ~nan & ((new > old) | ((new == old) & earlier))
        )
        best = torch.where(better, other, best)
    return values.gather(d, best), index.gather(d, best)


def _rows(like: Tensor, at: Sequence[int]) -> Tensor:
    return constant(tuple(at), torch.int64, like)


# rules -------------------------------------------------------------------------------------------


def _floating(x: ShardTensor, name: str) -> ShardTensor:
    if not x.is_floating_point():
        raise UnsupportedOpError(f"{name} of {x.dtype} {x._spec}: torch has it for floats only")
    return reduced(x)


def _define_adaptive(n: int) -> None:
    """The rules of adaptive pools over n dims."""

    @rule(f"adaptive_avg_pool{n}d")
    def adaptive_avg_pool(input: ShardTensor, output_size: Any) -> Any:
        hold_to_dims(input, n, getattr(F, f"adaptive_avg_pool{n}d"), output_size)
        x = _floating(input, f"adaptive_avg_pool{n}d")
        targets = _targets(x, n, output_size)
        if 0 in targets:
            return _nothing(x, n, targets)
        if all(m == 1 for m in targets):
            mean = x.mean(tuple(range(x.ndim - n, x.ndim)), keepdim=True)
            return mean.to(result_dtype(x, n, lambda some: _AVG[n](some, [1] * n)))
        spec, here, plans = _split_up(x, n, targets)
        if not plans:
            return _as_image(wrap(_local(x._local, n, here, _AVG[n]), spec), x, n)
        return _averages(x, n, targets)

    @rule(f"adaptive_max_pool{n}d")
    def adaptive_max_pool(input: ShardTensor, output_size: Any) -> Any:
        hold_to_dims(input, n, getattr(F, f"adaptive_max_pool{n}d"), output_size)
        x = _floating(input, f"adaptive_max_pool{n}d")
        targets = _targets(x, n, output_size)
        if 0 in targets:
            return _nothing(x, n, targets), _nothing(x.detach(), n, targets).long()
        spec, here, plans = _split_up(x, n, targets)
        if plans:
            return _maxima(x, n, targets)
        out, index = _local(x._local, n, here, _MAX[n])
        if any(d.axes for d in x._spec.dims[-n:]):
            index = _whole_positions(index, x._spec, n)
        return _as_image(wrap(out, spec), x, n), _as_image(wrap(index, spec), x, n)


for _n in (1, 2, 3):
    _define_adaptive(_n)
