"""What is normalised with the statistics of several ranks, by CUDA's kernels of SyncBatchNorm.

Forward: mean and inverse deviation of this rank's part (Welford's), one message, one kernel that
merges all ranks' and moves running statistics, one affine kernel. Backward: two sums in one kernel,
one message, one affine kernel. Without a mean the norm of each row takes the place of the
statistics. Nothing waits for the device. Elsewhere, and for what the kernels do not have, it is
`normalise`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._torch import probe
from ...comm import wire
from ...comm.constants import constant
from . import normalise as program
from .moments import GATHERED, accumulated
from .normalise import Way, of_channels, per_row
from .numbers import tensor_of, track

# running mean and variance (None: not tracked) and how far they move
Running = tuple[Tensor | None, Tensor | None, float] | None


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    way: Way,
    kept: list[Any] | None = None,
    running: Running = None,
) -> Tensor:
    """As `normalise.normalise`; where it moves running itself, nothing is added to kept."""
    if not _has_kernels(x) or way.scattered or way.group is None or probe.is_proxied():
        return program.normalise(x, weight, bias, way, kept)
    weight, bias = way.parts(weight, bias)
    way = replace(way, blocks=())
    if way.last or way.apart:
        x = x.contiguous()
    if running is not None and not _moves(running, x):
        running = None
    if running is not None:
        kept = None
    return _Normalise.apply(x, weight, bias, way, kept, running)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and type(x) in (Tensor, torch.nn.Parameter)


def _moves(running: tuple[Any, ...], x: Tensor) -> bool:
    """Whether the merging kernel can write to these running statistics."""
    dtype = accumulated(x.dtype)
    return all(r is not None and r.dtype == dtype for r in running[:2])


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, way: Way,
        kept: list[Any] | None, running: Running,
    ) -> Tensor:  # fmt: skip
        """Statistics, one message, one merge, one affine map."""
        ctx.materialize_grads = False
        rows = way.rows(x)
        mean, slope = _statistics(rows, way, running)
        if kept is not None:
            kept += [mean, slope**-2 - way.eps]
        ctx.way, ctx.mean, ctx.slope = way, per_row(mean, way), per_row(slope, way)
        ctx.save_for_backward(x, weight, bias)
        w, b = (None, None) if way.last else (_of_rows(v, x, way) for v in (weight, bias))
        if not x.numel():
            return torch.empty_like(x)
        y = torch.batch_norm_elemt(rows, w, b, ctx.mean, ctx.slope, way.eps).view(x.shape)
        y = program.scaled(y, weight, bias) if way.last else y
        # no view, to which autograd would let nobody write
        return y.data

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        """Two sums, one message, one affine map; recorded op by op for second derivatives."""
        if g is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            return *program.recorded(ctx, g), None, None, None
        way: Way = ctx.way
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dw = db = w = None
        if way.last or way.apart:
            g = g.contiguous()
        if way.last:
            dw, db = program.elementwise(g, x, weight, bias, ctx.mean, ctx.slope, way, needs)
            g = g if weight is None else g * weight
        else:
            w = _of_rows(weight, x, way)
        rows, g = way.rows(x), way.rows(g.to(x.dtype))
        total, along = _sums(g, rows, ctx.mean, ctx.slope, w, way)
        if not way.last:
            values, weights = (along * ctx.slope, total), (weight, bias)
            dw, db = of_channels(values, weights, needs[1:3], x, way)
        if not needs[0] or not x.numel():
            dx = torch.zeros_like(x) if needs[0] else None
            return dx, dw, db, None, None, None
        if way.width > 1:
            if w is not None:
                shape = (-1, *[1] * (g.ndim - 2))
                g, total, along = g * w.view(shape).to(g.dtype), total * w, along * w
            w = None
            both = torch.stack((total, along)).view(2, -1, way.width).sum(2)
            total, along = (per_row(v, way) for v in both)
        counts = _counts(way, x, torch.int32)
        dx = torch.batch_norm_backward_elemt(
            g, rows, ctx.mean, ctx.slope, w, total, along, counts
        ).view(x.shape)
        return dx, dw, db, None, None, None


def _statistics(rows: Tensor, way: Way, running: Running) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation over all ranks, of each statistic."""
    assert way.group is not None
    dtype = accumulated(rows.dtype)
    n = rows.shape[1] // way.width
    if not way.centred:
        return _of_squares(rows, way, way.group)
    if len(way.counts) > GATHERED:
        # the sums of so many ranks take one all-reduce; it is small arithmetic in float64
        wide = torch.float64
        mean, var = (tensor_of(v, wide) for v in program.whole_statistics(rows, way))
        if running is not None:
            track(running[:2], (mean, var), way.n, running[2])
        return mean.to(dtype), (var + way.eps).rsqrt().to(dtype)
    if rows.numel():
        parts = rows if way.width == 1 else rows.view(1, n, way.width, *rows.shape[2:])
        message = torch.cat(torch.batch_norm_stats(parts, way.eps))
    else:
        message = rows.new_zeros(2 * n, dtype=dtype)
    ranks = len(way.counts)
    found = wire.all_gather_rows(message, [2 * n] * ranks, 2 * n, way.group)
    if 0 in way.counts:
        # the kernel divides by their number of elements
        found = torch.cat([found[i : i + 1] for i, c in enumerate(way.counts) if c])
    moving, moved, by = running or (None, None, 0.0)
    counts = _counts(way, rows, dtype)
    return torch.batch_norm_gather_stats_with_counts(
        found, found[:, :n], found[:, n:], moving, moved, by, way.eps, counts
    )


def _of_squares(rows: Tensor, way: Way, group: str) -> tuple[Tensor, Tensor]:
    """Means of zero and the inverse roots of the mean squares over all ranks."""
    dtype, n = accumulated(rows.dtype), rows.shape[1]
    squares = rows.new_zeros(n, dtype=dtype)
    if rows.numel():
        squares = torch.linalg.vector_norm(
            rows, 2, (0, *range(2, rows.ndim)), dtype=dtype
        ).square_()
    whole = _added(wire.addends(squares, group))
    # (total / n + eps) ^ -1/2 in few kernels
    slope = whole.add_(way.eps * way.n).rsqrt_().mul_(way.n**0.5)
    return torch.zeros_like(slope), slope


def _added(every: list[Tensor]) -> Tensor:
    return every[0] if len(every) == 1 else torch.stack(every).sum(0)


def _sums(
    g: Tensor, rows: Tensor, mean: Tensor, slope: Tensor, w: Tensor | None, way: Way
) -> tuple[Tensor, Tensor]:
    """Over all ranks, for each row, the sums of g and of g * (x - mean)."""
    assert way.group is not None
    n = rows.shape[1]
    if rows.numel():
        found = torch.batch_norm_backward_reduce(g, rows, mean, slope, w, True, False, False)
        flat = torch.cat(found[:2])
    else:
        flat = mean.new_zeros(2 * n)
    if not way.centred:
        # a sum that counts for nothing
        return torch.zeros_like(mean), _added(wire.addends(flat[n:], way.group))
    flat = _added(wire.addends(flat, way.group))
    return flat[:n], flat[n:]


def _counts(way: Way, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of elements of a statistic on each rank that has some."""
    return constant(tuple([way.width * c for c in way.counts if c]), dtype, like)


def _of_rows(weight: Tensor | None, x: Tensor, way: Way) -> Tensor | None:
    """Each row's weight, which is that of its channel."""
    if weight is None:
        return None
    weight = weight.to(accumulated(x.dtype))
    return weight.repeat(x.shape[0]) if way.apart and x.shape[0] != 1 else weight
