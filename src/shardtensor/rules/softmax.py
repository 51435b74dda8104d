"""Softmax: over a sharded dim with the largest value and the sum of all ranks.

Two all-reduces of one number a row in the forward, one in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..registry import rule
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced
from .empty import with_one
from .reduce import over, wide


def _either(input: ShardTensor, dim: int, dtype: Any, fn: Any) -> ShardTensor:
    x = reduced(input)
    dims = over(dim, x.ndim)
    if x.is_complex() and dtype is None:
        raise NotImplementedError(f"softmax not implemented for {x.dtype}")
    if not dims or not x._spec.dims[dims[0]].axes:
        return wrap(fn(x._local, dim, dtype=dtype), x._spec)
    # what torch would give, under autocast too
    out = fn(x._local.new_zeros(1), 0, dtype=dtype).dtype
    local = x._local.to(wide(out))
    group = comm.along(x._spec, dims[0])
    most = with_one(local.detach(), dims, float("-inf")).amax(dims, keepdim=True)
    most = comm.reduce(most, group, "max")
    shifted = local - most
    size = shifted.exp()
    # the sum is the same on each rank, and each uses it differently
    (total,) = comm.vary([comm.reduce(size.sum(dims, keepdim=True), group)], group)
    found = shifted - total.log() if fn is torch.log_softmax else size / total
    return wrap(found.to(out), x._spec)


@rule("softmax", "special_softmax")
def softmax(input: ShardTensor, dim: int, dtype: Any = None) -> Tensor:
    return _either(input, dim, dtype, torch.softmax)


@rule("log_softmax", "special_log_softmax")
def log_softmax(input: ShardTensor, dim: int, dtype: Any = None) -> Tensor:
    return _either(input, dim, dtype, torch.log_softmax)


@rule("_softmax")
def leaf_softmax(input: ShardTensor, dim: int, half_to_float: bool) -> Tensor:
    return _either(input, dim, torch.float32 if half_to_float else None, torch.softmax)


@rule("_log_softmax")
def leaf_log_softmax(input: ShardTensor, dim: int, half_to_float: bool) -> Tensor:
    return _either(input, dim, torch.float32 if half_to_float else None, torch.log_softmax)


@rule("_safe_softmax")
def safe_softmax(input: ShardTensor, dim: int, dtype: Any = None) -> Tensor:
    """Zero, not NaN, where all of a row is -inf."""
    masked = (input == float("-inf")).all(dim, keepdim=True)
    return input.masked_fill(masked, 0.0).softmax(dim, dtype).masked_fill(masked, 0.0)
