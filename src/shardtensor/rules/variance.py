"""Variance and standard deviation: every rank's mean and squared deviations, merged.

One small gather in the forward, nothing in the backward; keeps only the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import comm
from ..registry import rule
from ..tensor import ShardTensor, wrap
from ..tensor.recut import apart
from ..tensor.redistribute import reduced
from .norm.moments import accumulated, spread, statistics
from .reduce import Dims, over, without


def _moments(
    input: ShardTensor, dim: Dims, correction: float, keepdim: bool
) -> tuple[ShardTensor, ShardTensor]:
    """(variance, mean)."""
    dims = over(dim, input.ndim)
    x = apart(reduced(input), dims)
    axes, counts = spread(x._spec, dims)
    spec = without(x._spec, dims, keepdim)
    if not axes:
        v, m = torch.var_mean(x._local, dims, correction=correction, keepdim=keepdim)
        return wrap(v, spec), wrap(m, spec)
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        raise RuntimeError("std and var only support floating point and complex dtypes")
    local = torch.view_as_real(x._local) if x.dtype.is_complex else x._local
    group = comm.group(x._spec.mesh, axes)
    m, m2 = statistics(local, dims, counts, group, accumulated(local.dtype))
    n = sum(counts)
    if n == 0:
        m = m * float("nan")
    v = m2 / max(0.0, n - correction)
    if x.dtype.is_complex:
        m, v = torch.view_as_complex(m.contiguous()), v.sum(-1)
    if not keepdim:
        m, v = m.squeeze(dims), v.squeeze(dims)
    return wrap(v.to(local.dtype), spec), wrap(m.to(x.dtype), spec)


def _root(v: ShardTensor) -> ShardTensor:
    """The square root, whose gradient at zero is zero as in torch.std."""
    zero = v._local == 0
    return wrap(v._local.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0), v._spec)


def _define(name: str, result: Callable[[ShardTensor, ShardTensor], Any]) -> None:
    """The rule of an op whose result is made of (variance, mean)."""

    @rule(name)
    def statistic(
        input: ShardTensor,
        dim: Any = None,
        unbiased: bool | None = None,
        keepdim: bool = False,
        *,
        correction: float | None = None,
    ) -> Any:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased is None or unbiased else 0
        return result(*_moments(input, dim, correction, keepdim))


_define("var", lambda v, m: v)
_define("std", lambda v, m: _root(v))
_define("var_mean", lambda v, m: (v, m))
_define("std_mean", lambda v, m: (_root(v), m))
