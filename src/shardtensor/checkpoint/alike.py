"""Whether what ranks give under one key of a checkpoint is the same, bit by bit."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ..containers import leaves

# of 8 bytes, which are read at a time
_BLOCK = 1 << 20
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


def digest(x: Any) -> int:
    """A number that differs where values do; of objects, and of tensors that are no rows of
    numbers (sparse, nested, quantized), their type counts.
    """
    if isinstance(x, Tensor) and _has_rows(x):
        return _of_bits(x.detach())
    return crc32(repr(sorted((path, _said(v)) for path, v in leaves(x))).encode())


def _said(x: Any) -> str:
    if isinstance(x, Tensor) and _has_rows(x):
        return f"{x.dtype} {tuple(x.shape)} {_of_bits(x.detach())}"
    if isinstance(x, set | frozenset):
        return repr(sorted(map(_said, x)))
    return f"{type(x).__name__} {x!r}" if isinstance(x, _PLAIN) else type(x).__name__


def _has_rows(x: Tensor) -> bool:
    return x.layout is torch.strided and not (x.is_nested or x.is_quantized or x.is_meta)


def _of_bits(x: Tensor) -> int:
    """A hash of the bits, 8 bytes at a time, which are read where they lie."""
    x = x.resolve_conj().resolve_neg().reshape(-1)
    if x.storage_offset() * x.element_size() % 8 or x.stride() != (1,):
        x = x.clone(memory_format=torch.contiguous_format)
    data = x.view(torch.uint8)
    whole = len(data) // 8 * 8
    numbers = data[:whole].view(torch.int64)
    by = _mixed(torch.arange(1, min(_BLOCK, len(numbers)) + 1, device=x.device)) | 1
    found = [_mixed(part * by[: len(part)]).sum() for part in numbers.split(_BLOCK)]
    found += data[whole:].long()
    return sum(int(v) * i for i, v in enumerate(found, 1))


def _mixed(x: Tensor) -> Tensor:
    """Numbers of which a change of one bit changes many."""
    x = x * 0x1E3779B97F4A7C15
    return (x ^ (x >> 32)) * 0x3F58476D1CE4E5B9
