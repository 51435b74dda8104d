"""Mean and variance of elements that lie on several ranks, and what is normalised with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from ... import _torch, comm
from ..._torch import kernels
from ...cache import cached
from ...comm.constants import constant
from ...spec import Spec
from ..reduce import axes_of

Dims = tuple[int, ...]
Counts = tuple[int, ...]
# ranks up to which all of them send their statistics to all; more add them up
GATHERED = 16


@cached
def spread(spec: Spec, dims: Dims) -> tuple[tuple[int, ...], Counts]:
    """The mesh axes over which an average over dims is spread, and every rank's number of elements.

    No axes where one rank holds all of it.
    """
    axes = axes_of(spec, dims)
    shape = [spec.mesh.size(a) for a in axes]
    at = dict(zip(axes, np.indices(shape).reshape(len(axes), prod(shape)), strict=True))
    counts = np.ones(prod(shape), np.int64)
    for dim in (spec.dims[d] for d in dims):
        shard = np.zeros(len(counts), np.int64)
        for axis in dim.axes:
            shard = shard * spec.mesh.size(axis) + at.get(axis, 0)
        counts = counts * np.diff(dim.edges)[shard] if dim.axes else counts * dim.size
    return (axes if len(counts) > 1 else ()), tuple(counts.tolist())


def squares(x: Tensor, center: Tensor, dims: Dims) -> Tensor:
    """The sum over dims of (x - center)^2 in the dtype of center; keeps only x for backward."""
    with torch.autocast(x.device.type, enabled=False):
        x = x if kernels.MIXED_LOSS else x.to(center.dtype)
        return kernels.nn.mse_loss(x, center.expand_as(x), 0).sum(dims, keepdim=True)


def moments(x: Tensor, dims: Dims, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of the local part; zeros where it is empty.

    torch.var_mean is 10 to 20 times slower than this on a CPU, and would keep a copy of half
    precision inputs in full precision.
    """
    total = x.sum(dims, keepdim=True, dtype=dtype)
    n = prod(x.shape[d] for d in dims)
    mean = total / max(1, n)
    center = mean.detach()
    m2 = squares(x, center, dims)
    # zero, and so is its slope; but the second derivative needs it
    again = _torch.differentiated(mean)
    return mean, m2 - n * (mean - center).square() if again else m2


def merged(mean: Tensor, m2: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
    """Mean and squared deviations of parts that are stacked along dim 0, of `counts` elements each.

    Chan, Golub, LeVeque: Algorithms for computing the sample variance, 1983.
    """
    # means relative to one of them: their weighted sum would round at the size of the mean
    anchor = mean[counts.index(max(counts))].detach()
    if len(set(counts)) == 1:
        whole = anchor + (mean - anchor).mean(0)
        return whole, m2.sum(0) + counts[0] * (mean - whole).square().sum(0)
    n = constant(tuple(counts), mean.dtype, mean).view(-1, *[1] * (mean.ndim - 1))
    if 0 in counts:
        # zero times the square of a large number would be zero times infinity
        mean = torch.where(n == 0, anchor, mean)
    whole = anchor + ((mean - anchor) * (n / sum(counts))).sum(0)
    return whole, (m2 + n * (mean - whole).square()).sum(0)


def _added(mean: Tensor, m2: Tensor, counts: Counts, group: str) -> tuple[Tensor, Tensor]:
    """As `merged`, of every rank's own part, in sums over the ranks."""
    n, mine = sum(counts), counts[comm.rank(group)]
    if mean.dtype is torch.float64:
        # the difference of two sums would round at the square of the mean
        whole = comm.reduce(mean * (mine / n), group)
        (shared,) = comm.vary([whole], group)
        # none of an empty part, were its distance infinite
        off = mean - shared if mine else 0.0 * shared
        return whole, comm.reduce(m2 + mine * off.square(), group)
    wide = mean.double()
    sums = torch.stack((wide * (mine / n), m2 / n + wide.square() * (mine / n)))
    whole, square = comm.reduce(sums, group)
    return whole.to(mean.dtype), (n * (square - whole.square()).clamp_min(0.0)).to(mean.dtype)


def statistics(
    x: Tensor, dims: Dims, counts: Counts, group: str | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and squared deviations over dims (kept) of all ranks' parts, replicated over group."""
    mean, m2 = moments(x, dims, dtype)
    if group is None:
        return mean, m2
    if len(counts) > GATHERED:
        return _added(mean, m2, counts, group)
    both = comm.gather(torch.stack((mean, m2))[None], 0, (1,) * len(counts), group)
    return merged(both[:, 0], both[:, 1], counts)


@cache
def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def single(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """x, and the weights beside it: under autocast in fp32 at least, as a GPU's autocast has them.

    CPUs take no narrower ones beside an input or statistics in fp32.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return [x, *weights]
    return [x, *(w if w is None else w.to(accumulated(w.dtype)) for w in weights)]


def scaled(x: Tensor, center: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a * (x - center) + b, given per channel (C,) or per sample and channel (B, C).

    The kernel of batch norm with fixed statistics does it in one pass, rounds half precision once
    and keeps only x for backward.
    """
    if a.ndim == 2:
        if x.shape[0] == 1:
            return scaled(x, center[0], a[0], b[0])
        if x.is_contiguous() and x.numel():
            flat = x.view(1, a.numel(), *x.shape[2:])
            return scaled(flat, center.flatten(), a.flatten(), b.flatten()).view(x.shape)
    # whose fixed statistics may not even have a derivative of zero
    if a.ndim == 1 and x.numel() and not _torch.transforming():
        one = torch.ones_like(center)
        y = torch.batch_norm(x, a, b, center, one, False, 0.0, 0.0, False)
        if y.requires_grad and x.device.type == "cpu" and not _torch.is_tracing():
            # torch 2.13's kernel reads a gradient of other strides, a transposed one, wrongly
            form = x.is_contiguous() or x.ndim not in (4, 5)
            y.register_hook(torch.Tensor.contiguous if form else _channels_last)
        return y
    shape = (*a.shape, *[1] * (x.ndim - 2)) if a.ndim == 2 else (-1, *[1] * (x.ndim - 2))
    if not a.numel():
        shape = (x.shape[0] if a.ndim == 2 else 1, x.shape[1], *[1] * (x.ndim - 2))
    return torch.addcmul((b - center * a).view(shape), x, a.view(shape)).to(x.dtype)


def _channels_last(g: Tensor) -> Tensor:
    form = torch.channels_last if g.ndim == 4 else torch.channels_last_3d
    return g.contiguous(memory_format=form)


def normalised(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    deal: Callable[..., Sequence[Tensor]],
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, for statistics per channel that are replicated.

    deal brings the replicated coefficients (center, a, b) to the local program, with their
    gradients summed.
    """
    a = (var + eps).rsqrt()
    if weight is not None:
        a = a * weight
    # the value is the bias, the slope that of -mean * a: centred, nothing cancels in backward
    center = mean.detach()
    b = (center - mean) * a
    if bias is not None:
        b = b + bias
    return scaled(x, *deal(center, a, b))
