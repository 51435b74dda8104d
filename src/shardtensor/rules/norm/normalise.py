"""What is normalised with the statistics of several ranks: one local program with its backward.

Forward: mean and variance of this rank's part in one kernel, one message, one affine map. Backward:
two sums in one kernel, one message, one affine map of input and gradient; its sums are also the
whole gradients of weight and bias. Between them is float64 arithmetic on a few numbers. It keeps
the input and the statistics. Where a graph is made, and for second derivatives, the same program is
written in differentiable ops and collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _torch, comm
from ..._torch import Function, kernels, probe
from ...cache import cached
from ...comm.constants import constant
from .affine import affine, alike, far
from .checks import lying_as
from .moments import GATHERED, Counts, accumulated, normalised, squares, statistics
from .numbers import (
    Blocks,
    Numbers,
    fresh,
    gathered,
    numbers_of,
    slices,
    summed,
    summed_beside,
    tensor_of,
    tensors,
)
from .part_moments import moments_of

# gradients of weight and bias
Weights = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Way:
    """Over what each statistic is taken.

    counts: every rank's number of elements of a row; n: all elements of a statistic. The rows that
    have a weight each are the channels
    (batch norm), with `apart` the channels of each sample, of which `width` share a statistic; with
    `last` dims normalised elementwise they are what those dims leave, and weights lie along those.
    centred: with a mean; else that is taken as zero. scattered: samples that lie in another order
    than rows first, which a shard of one sample need not show. blocks: for every rank the (start,
    stop) of the last dims that it has, where weights are whole; none where they are cut like these.
    """

    counts: Counts
    n: int
    group: str | None
    eps: float
    apart: bool = False
    width: int = 1
    last: int = 0
    centred: bool = True
    scattered: bool = False
    blocks: Blocks = ()

    def own(self, weight: Tensor | None) -> Tensor | None:
        """This rank's part of a weight, as a view."""
        if weight is None or not self.blocks or self.group is None:
            return weight
        return weight[slices(self.blocks[comm.rank(self.group)])]

    def parts(self, *weights: Tensor | None) -> Sequence[Tensor | None]:
        """This rank's parts of weights, whose gradients are summed as those of other values."""
        if not self.blocks:
            return weights
        return [None if w is None else self.own(*self.deal(w)) for w in weights]

    def rows(self, x: Tensor) -> Tensor:
        """x as (samples, rows, ...)."""
        lead = 2 if self.apart else x.ndim - self.last
        if self.last or (self.apart and x.shape[0] != 1):
            return x.view(1, prod(x.shape[:lead]), *x.shape[lead:])
        return x

    def deal(self, *values: Tensor) -> Sequence[Tensor]:
        """Replicated values for use beside shards."""
        return comm.vary(values, self.group) if self.group else values


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, way: Way, kept: list[Any] | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias; mean and variance are added to kept."""
    kept = [] if kept is None else kept
    if way.last:
        x = x.contiguous()
    under = _torch.functorch_level() is not None or _torch.dual_level() >= 0
    if under or way.scattered or probe.is_proxied():
        return _plainly(x, weight, bias, way, kept)
    if way.apart:
        x = x.contiguous()
    return _Normalise.apply(x, weight, bias, way, kept)


class _Normalise(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, way: Way, kept: list[Any]
    ) -> Tensor:
        """Statistics, one message, one affine map."""
        ctx.materialize_grads = False
        rows = way.rows(x) if way.last or way.apart else x
        mean, var = whole_statistics(rows, way)
        kept += [mean, var]
        slope = (var + way.eps) ** -0.5
        if way.width > 1:
            mean, slope = per_row(mean, way), per_row(slope, way)
        ctx.way, ctx.mean, ctx.slope = way, mean, slope
        ctx.far, ctx.kernel = far(rows, mean, slope), None
        ctx.save_for_backward(x, weight, bias)
        if way.last:
            y = affine(rows, ctx.slope, 0.0, ctx.mean, ctx.far).view(x.shape)
            y = scaled(y, way.own(weight), way.own(bias))
        elif rows is x and not ctx.far and way.width == 1 and alike(x, weight, bias):
            # the kernel's own slope, of variance, eps and weight
            at, spread, *rest = tensors(x, x.shape[1], mean, var, slope, 1.0)
            ctx.kernel = (at, *rest)
            y = torch.native_batch_norm(x, weight, bias, at, spread, False, 0.0, way.eps)[0]
        else:
            times, plus = _of_rows(weight, x, way, 1.0), _of_rows(bias, x, way, 0.0)
            y = affine(rows, ctx.slope * times, plus, ctx.mean, ctx.far).view(x.shape)
        # no view, to which autograd would let nobody write
        return y.data

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        """Two sums, one message, the gradient; recorded op by op for second derivatives."""
        if g is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            return *recorded(ctx, g), None, None
        way: Way = ctx.way
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mean, slope = ctx.mean, ctx.slope
        dw = db = None
        if way.last or way.apart:
            g = g.contiguous()
        if way.last:
            dw, db = elementwise(g, x, weight, bias, mean, slope, way, needs)
            times = 1.0
            if weight is not None:
                own = way.own(weight)
                assert own is not None
                g = torch.mul(g, own, out=torch.empty_like(x))
        else:
            times = _of_rows(weight, x, way, 1.0)
        rows, g = (way.rows(x), way.rows(g)) if way.last or way.apart else (x, g)
        along, total, (dw, db) = _sums(rows, g, mean, slope, ctx.kernel, way, (dw, db))
        if not way.last:
            dw, db = of_channels((along, total), (weight, bias), needs[1:3], x, way)
        if not needs[0]:
            return None, dw, db, None, None
        # what varies along the statistic has no part in the sums and the slopes against x
        by_x, by_one = times * along, times * total
        if way.width > 1:
            by_x, by_one = (per_row(_per_group(v, way), way) for v in (by_x, by_one))
        share = slope * (-1.0 / way.n)
        by_x, by_one = by_x * slope * share, by_one * share
        if x.dtype != accumulated(x.dtype):
            # coefficients of half precision would round all gradients of a channel alike
            dx = affine(rows, by_x, by_one, mean, ctx.far)
            dx += affine(g, times * slope, 0.0, 0.0, False)
        else:
            dx = affine(rows, by_x, by_one, mean, ctx.far, (g, times * slope))
        return dx.view(x.shape), dw, db, None, None


def scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight + bias, elementwise along the last dims, in place."""
    if weight is not None:
        return y.mul_(weight) if bias is None else torch.addcmul(bias, y, weight, out=y)
    return y if bias is None else y.add_(bias)


def whole_statistics(rows: Tensor, way: Way) -> tuple[Numbers, Numbers]:
    """Mean and variance over all ranks, of each statistic, in float64."""
    mean, var = moments_of(rows)
    n = rows.numel() // max(1, rows.shape[1])
    if not way.centred:
        part = n * (var + mean * mean)
        if isinstance(part, np.ndarray) and np.isnan(part).any():
            # the square of infinity is no NaN, the variance beside it is
            dims = (0, *range(2, rows.ndim))
            part = fresh(torch.linalg.vector_norm(rows, 2, dims, dtype=torch.float64))[0] ** 2
        whole = part if way.group is None else summed(rows, [part], way.group)[0]
        return _zeros(whole), whole / way.n
    if way.width > 1:
        parts, within = mean.reshape(-1, way.width), var.reshape(-1, way.width)
        mean = parts.mean(1)
        var = (within + (parts - mean.reshape(-1, 1)) ** 2).mean(1)
        n *= way.width
    if way.group is None:
        return mean, var
    if len(way.counts) <= GATHERED:
        found = gathered([mean, var], way.group)
        most, empty, counts = _weights(way.counts, way.width, way.n)
        if not isinstance(mean, np.ndarray):
            counts = constant(way.counts, torch.float64, rows).reshape(-1, 1) * (way.width / way.n)
        # numpy's own `sum` is two calls of Python
        added: Any = np.add.reduce if isinstance(mean, np.ndarray) else torch.sum
        means, vars = found[:, 0], found[:, 1]
        # relative to one of them: their weighted sum would round at the size of the mean
        anchor = means[most]
        if empty:
            # zero times the square of a large number would be zero times infinity
            means = means + (counts == 0) * anchor
        whole = anchor + added((means - anchor) * counts, 0)
        return whole, added((vars + (means - whole) ** 2) * counts, 0)
    share = n / way.n
    if accumulated(rows.dtype) is torch.float64:
        # the difference of two sums would round at the square of the mean
        whole = summed(rows, [share * mean], way.group)[0]
        mean = mean if n else whole
        return whole, summed(rows, [share * (var + (mean - whole) ** 2)], way.group)[0]
    whole, square = summed(rows, [share * mean, share * (var + mean**2)], way.group, wide=True)
    var = square - whole**2
    # numpy's own `clip` is three calls of Python
    return whole, var * (var > 0.0)


def _zeros(values: Numbers) -> Numbers:
    """Zeros, also in place of NaN and infinity."""
    return 0.0 * (values > 0.0)


@cached
def _weights(counts: Counts, width: int, n: int) -> tuple[int, bool, Numbers]:
    """The rank with most elements, whether some rank has none, each rank's share of them all."""
    shares = np.array(counts, dtype=np.float64).reshape(-1, 1) * (width / n)
    return counts.index(max(counts)), 0 in counts, shares


def _sums(
    rows: Tensor, g: Tensor, mean: Numbers, slope: Numbers, kernel: Sequence[Tensor] | None,
    way: Way, own: Weights,
) -> tuple[Numbers, Numbers, Weights]:  # fmt: skip
    """Over all ranks, for each row, the sums of g * (x - mean) * slope and of g; `own` whole.

    kernel: mean, slope and ones in the dtype in which rows accumulate, where there are any.
    """
    parts: list[Numbers]
    if rows.numel():
        center, scale, one = kernel or tensors(rows, rows.shape[1], mean, slope, 1.0)
        g = g if rows.is_contiguous() is g.is_contiguous() else lying_as(rows, g)
        # CUDA's kernel gives these gradients in the form of the weight, which it must have
        _, along, total = kernels.batch_norm_backward(
            g, rows, one, None, None, center, scale, True, 0.0, [False, True, True]
        )
        *parts, rounded = fresh(along, total, center)
        if way.centred:
            # the kernel took the rounded mean
            parts[0] = parts[0] - (mean - rounded) * slope * parts[1]
    else:
        parts = fresh(rows.new_zeros(rows.shape[1], dtype=accumulated(rows.dtype))) * 2
    if not way.centred:
        parts.pop()
    given = [w for w in own if w is not None] if way.blocks else ()
    if way.group is not None and given:
        parts, wholes = summed_beside(rows, parts, given, way.blocks, way.group)
        found = iter([whole.to(w.dtype) for whole, w in zip(wholes, given, strict=True)])
        own = tuple(None if w is None else next(found) for w in own)
    elif way.group is not None:
        parts = list(summed(rows, parts, way.group))
    return parts[0], parts[1] if way.centred else _zeros(parts[0]), own


def _per_group(rows: Numbers, way: Way) -> Numbers:
    """The sums of the rows that share a statistic."""
    return rows if way.width == 1 else rows.reshape(-1, way.width).sum(1)


def per_row(values: Numbers, way: Way) -> Numbers:
    """For each row the value of its statistic."""
    if way.width == 1:
        return values
    if isinstance(values, Tensor):
        return values.unsqueeze(-1).expand(-1, way.width).reshape(-1)
    return values.repeat(way.width)


def _of_rows(weight: Tensor | None, x: Tensor, way: Way, default: float) -> Any:
    """Each row's weight, which is that of its channel."""
    if weight is None:
        return default
    found = numbers_of(weight)
    if not way.apart or x.shape[0] == 1:
        return found
    return found.repeat(x.shape[0]) if isinstance(found, Tensor) else np.tile(found, x.shape[0])


def of_channels(
    values: Sequence[Numbers], weights: Weights, needs: Sequence[bool], x: Tensor, way: Way
) -> Weights:
    """The gradients of weights from what their rows add to them; None where there is no need."""
    found = list[Tensor | None]()
    for rows, weight, need in zip(values, weights, needs, strict=True):
        if weight is None or not need:
            found.append(None)
            continue
        if way.apart and x.shape[0] != 1:
            rows = rows.reshape(x.shape[0], weight.numel()).sum(0)
        found.append(tensor_of(rows, weight.dtype))
    return tuple(found)


def elementwise(
    g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Numbers, slope: Numbers,
    way: Way, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of weight and bias that lie along the last dims, of this rank's rows."""
    if not (needs[1] or needs[2]):
        return None, None
    shape = x.shape[-way.last :]
    if not x.numel():
        dw, db = x.new_zeros(shape), x.new_zeros(shape)
    else:
        center, scale = tensors(x, mean.shape[0], mean, slope)
        if probe.is_fake(x):
            # torch's kernels take them in any shape, its fake ones do not
            lead = [*x.shape[: -way.last], *[1] * way.last]
            center, scale = center.reshape(lead), scale.reshape(lead)
        # of which only the shape is read
        one = scale.new_empty(shape)
        _, dw, db = torch.ops.aten.native_layer_norm_backward(
            g, x, shape, center, scale, one, one, [False, needs[1], needs[2]]
        )
    return (
        dw.to(weight.dtype) if needs[1] and weight is not None else None,
        db.to(bias.dtype) if needs[2] and bias is not None else None,
    )


# with derivatives of every order -----------------------------------------------------------------


def recorded(ctx: Any, g: Tensor) -> list[Tensor | None]:
    """Gradients that have gradients themselves."""
    # nodes of their own: one operand may be made from another
    given = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
    x, weight, bias = given
    assert x is not None
    y = _plainly(x, weight, bias, ctx.way, [])
    needs = ctx.needs_input_grad[:3]
    wanted = [x for x, need in zip(given, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


def _plainly(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, way: Way, kept: list[Any]
) -> Tensor:
    """`normalise` in ops and collectives of which every derivative exists."""
    dtype = accumulated(x.dtype)
    weight, bias = way.parts(weight, bias)
    if not way.centred:
        part = squares(x, x.new_zeros((), dtype=dtype), tuple(range(x.ndim - way.last, x.ndim)))
        total = part if way.group is None else comm.reduce(part, way.group)
        (a,) = way.deal((total / way.n + way.eps).rsqrt())
        y = x * a if weight is None else x * a * weight
        return y.to(x.dtype)
    parts = x
    if way.last:
        dims = tuple(range(x.ndim - way.last, x.ndim))
    elif way.apart:
        parts = x.unflatten(1, (x.shape[1] // way.width, way.width))
        dims = tuple(range(2, parts.ndim))
    else:
        dims = (0, *range(2, x.ndim))
    counts = tuple(way.width * c for c in way.counts)
    mean, m2 = statistics(parts, dims, counts, way.group, dtype)
    mean, var = mean.flatten(1 if way.apart else 0), m2.flatten(1 if way.apart else 0) / way.n
    # a graph that is traced knows no no_grad()
    kept += [mean.detach(), var.detach()]
    if way.last:
        # the leading dims, which have a statistic each, take the place of channels
        rows = x.reshape(1, mean.numel(), *x.shape[x.ndim - way.last :])
        y = normalised(rows, mean, var, None, None, way.eps, way.deal).view(x.shape)
        if weight is not None:
            y = y * weight if bias is None else torch.addcmul(bias, y, weight)
        elif bias is not None:
            y = y + bias
        return y.to(x.dtype)
    if way.width > 1:
        mean, var = mean.repeat_interleave(way.width, 1), var.repeat_interleave(way.width, 1)
    return normalised(x, mean, var, weight, bias, way.eps, way.deal)
