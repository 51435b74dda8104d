"""Softmax: over a sharded dim with the largest value and the sum of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..redistribute import reduced
from ..registry import rule
from ..tensor import ShardTensor, wrap
from .reduce import over


def _wide(x: Tensor) -> Tensor:
    """Halves in single precision, in which torch too sums exponentials."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _shifted(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """(x less its largest value along d, the sum of the exponentials of that)."""
    shifted = x - x.detach().amax(d, keepdim=True)
    return shifted, shifted.exp().sum(d, keepdim=True)


def _either(input: ShardTensor, dim: int, dtype: Any, log: bool) -> Tensor:
    x = reduced(input) if dtype is None else reduced(input).to(dtype)
    assert isinstance(x, ShardTensor)
    dims = over(dim, x.ndim)
    if not dims or not x._spec.dims[dims[0]].axes:
        fn = torch.log_softmax if log else torch.softmax
        return wrap(fn(x._local, dim), x._spec)
    shifted, total = _shifted(_wide(x), dims[0])
    out = shifted - total.log() if log else shifted.exp() / total
    return out.to(x.dtype)


@rule("softmax", "special_softmax")
def softmax(input: ShardTensor, dim: int, dtype: Any = None) -> Tensor:
    return _either(input, dim, dtype, False)


@rule("log_softmax", "special_log_softmax")
def log_softmax(input: ShardTensor, dim: int, dtype: Any = None) -> Tensor:
    return _either(input, dim, dtype, True)


@rule("_softmax")
def leaf_softmax(input: ShardTensor, dim: int, half_to_float: bool) -> Tensor:
    return _either(input, dim, torch.float32 if half_to_float else None, False)


@rule("_log_softmax")
def leaf_log_softmax(input: ShardTensor, dim: int, half_to_float: bool) -> Tensor:
    return _either(input, dim, torch.float32 if half_to_float else None, True)
