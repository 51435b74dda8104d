"""Softmax: over a sharded dim with the largest value and the sum of all ranks.

Two all-reduces of one number a row in the forward, one in the backward.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from ..registry import rule
from ..spec import Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced
from .empty import with_one
from .reduce import given, over, wide


def _either(input: ShardTensor, dim: int, dtype: Any, fn: Any) -> ShardTensor:
    x = reduced(input) if input._spec.partial else input
    spec, local = x._spec, x._local
    if dtype is None and local.dtype.is_complex and not x.numel():
        # which torch has no kernel for, but of none gives none
        return wrap(fn(local, dim), spec)
    if dtype is None and local.dtype.is_complex:
        raise NotImplementedError(f"softmax not implemented for {local.dtype}")
    dims = _cut(spec, operator.index(dim))
    if not dims:
        return wrap(fn(local, dim, dtype=dtype), spec)
    # torch gives rows first, whatever it gets
    local = local.contiguous()
    out = given(fn, local, dtype)
    local = local.to(wide(out))
    group = comm.along(spec, dims[0])
    most = with_one(local.detach(), dims, float("-inf")).amax(dims, keepdim=True)
    most = comm.reduce(most, group, "max")
    shifted = local - most
    size = shifted.exp()
    # the sum is the same on each rank, and each uses it differently
    (total,) = comm.vary([comm.reduce(size.sum(dims, keepdim=True), group)], group)
    found = shifted - total.log() if fn is torch.log_softmax else size / total
    return wrap(found.to(out), spec)


@cached
def _cut(spec: Spec, dim: int) -> tuple[int, ...]:
    """The dim, if it lies in several shards."""
    return tuple([d for d in over(dim, len(spec.dims)) if spec.dims[d].is_cut])


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


@rule("_softmax_backward_data")
def softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    """The backward pass of softmax, which models with their own softmax call."""
    # as torch, in what it sums in
    g, y = (x.to(wide(x.dtype)) for x in (grad_output, output))
    weighted = g * y
    found = weighted - y * weighted.sum(dim, keepdim=True)
    return found.to(input_dtype)
