"""Layer and rms norm: over the last dims, whose weights are cut like them where they are cut.

The laws are those of `norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import comm
from ...cache import cached
from ...later import dt
from ...registry import rule
from ...spec import Dim, Spec, axes_in
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import beside, fit
from ..empty import stock
from ..operands import lifted
from .checks import hold_dtypes
from .cuda_norm import normalise
from .moments import Counts, Dims, accumulated, single, spread
from .norm import autocast
from .normalise import Way
from .numbers import Blocks


class Last(NamedTuple):
    """The dims that a normalized_shape names.

    mine: how weight and bias are cut, None where they are whole. group: of the ranks that share the
    dims out, None where each has them whole. counts: of `spread`. numel: of each statistic.
    varying: the group of ranks that have other rows, None without any.
    """

    dims: Dims
    mine: tuple[Dim, ...] | None
    group: str | None
    counts: Counts
    numel: int
    varying: str | None


@cached
def _last(name: str, spec: Spec, shape: tuple[int, ...]) -> Last:
    k, n = len(shape), len(spec.dims)
    if not 0 < k <= n or tuple(spec.shape[-k:]) != shape:
        raise RuntimeError(f"{name}: normalized_shape {list(shape)} for a tensor on {spec}")
    dims, mine = tuple(range(n - k, n)), spec.dims[-k:]
    axes, counts = spread(spec, dims)
    group = comm.group(spec.mesh, axes) if axes else None
    varying = comm.group(spec.mesh, spec.varying) if spec.varying else None
    return Last(dims, mine if axes_in(mine) else None, group, counts, max(1, prod(shape)), varying)


def _check_weights(shape: Sequence[int], *weights: Tensor | None) -> None:
    """Torch's own condition, which parts of a weight might meet that is too short or too long."""
    for w in weights:
        if w is not None and tuple(w.shape) != tuple(shape):
            raise RuntimeError(
                "Expected weight and bias to be of same shape as normalized_shape, but got "
                f"{[*w.shape]} and normalized_shape = {[*shape]}"
            )


def _elementwise(
    spec: Spec, mine: Sequence[Dim] | None, *weights: Tensor | None
) -> tuple[Sequence[Tensor | None], Blocks]:
    """Weights along dims of which each rank has its part, and every rank's part if they are whole.

    Whole they stay, and their gradients travel with the sums that the norm's backward sends.
    """
    if (
        any(
            isinstance(w, dt.DTensor) or (isinstance(w, ShardTensor) and w._spec.varying)
            for w in weights
        )
        or mine is None
        or all(w is None for w in weights)
    ):
        return fit(spec.mesh, spec.varying, *((w, mine) for w in weights)), ()
    axes = axes_in(mine)
    others = tuple(a for a in spec.varying if a not in axes)
    return fit(spec.mesh, others, *((w, None) for w in weights)), _blocks(spec, axes, len(mine))


@cached
def _blocks(spec: Spec, axes: Dims, last: int) -> Blocks:
    return tuple(spec.spans_at(at)[-last:] for at in spec.places(axes))


@rule("layer_norm")
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> ShardTensor:
    """Over the last dims; where they are sharded, weight and bias are cut like them."""
    x = lifted(input, weight, bias)
    spec, local = x._spec, x._local
    dims, mine, group, counts, n, varying = _last("layer_norm", spec, tuple(normalized_shape))
    local = autocast(local, _layer_normed)
    if group is None:
        w, b = (mine is None and beside(spec, varying, weight, bias)) or fit(
            spec.mesh, spec.varying, (weight, mine), (bias, mine)
        )
        lead = dims[0]
        rest: Any = (eps, cudnn_enable)
        xs = single(local, w, b)
        y = stock(lambda z, *wb: torch.layer_norm(z, z.shape[lead:], *wb, *rest), local.shape, *xs)
        return wrap(y, spec)
    _check_weights(spec.shape[-len(dims) :], weight, bias)
    hold_dtypes(torch.layer_norm, local, weight, bias)
    (w, b), blocks = _elementwise(spec, mine, weight, bias)
    way = Way(counts, n, group, eps, last=len(dims), blocks=blocks)
    return wrap(normalise(local, w, b, way), spec)


def _layer_normed(x: Tensor) -> Tensor:
    return torch.layer_norm(x, (1,))


@rule("rms_norm")
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> ShardTensor:
    """As layer_norm without the mean: sharded dims take one all-reduce of the sums of squares."""
    x = lifted(input, weight)
    spec, local = x._spec, x._local
    dims, mine, group, counts, n, _ = _last("rms_norm", spec, tuple(normalized_shape))
    local = autocast(local, lambda z: torch.rms_norm(z, (1,)))
    if group is None:
        (w,) = fit(spec.mesh, spec.varying, (weight, mine))
        lead = dims[0]
        y = stock(lambda z, w: torch.rms_norm(z, z.shape[lead:], w, eps), local.shape, local, w)
        return wrap(y, spec)
    _check_weights(spec.shape[-len(dims) :], weight)
    if eps is None:
        eps = torch.finfo(accumulated(local.dtype)).eps
    if not local.is_complex():
        (w,), blocks = _elementwise(spec, mine, weight)
        way = Way(counts, n, group, eps, last=len(dims), centred=False, blocks=blocks)
        return wrap(normalise(local, w, None, way), spec)
    (w,) = fit(spec.mesh, spec.varying, (weight, mine))
    total = comm.reduce(local.square().sum(dims, keepdim=True), group)
    (a,) = comm.vary(((total / sum(counts) + eps).rsqrt(),), group)
    y = local * a if w is None else local * a * w
    return wrap(y.to(local.dtype), spec)
