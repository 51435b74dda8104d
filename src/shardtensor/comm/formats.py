"""Memory formats: images and volumes whose channels lie last stay so, whatever moves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# by the number of dims
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a tensor: that of images with the channels last, or contiguous."""
    last = FORMATS.get(x.ndim)
    if last is None or x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=last) or lie_last(x.shape, x.stride()):
        return last
    return torch.contiguous_format


def lie_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether torch takes channels to lie last, also in a slice with gaps.

    As c10/core/MemoryFormat.h, is_channels_last_strides_2d_s4.
    """
    least = 0
    for d in (1, *reversed(range(2, len(shape))), 0):
        ambiguous = least == strides[1] if d == 0 else strides[1] == 0
        if ambiguous or not shape[d] or strides[d] < least:
            return False
        least = strides[d] * shape[d]
    return True


def compact(part: Tensor, x: Tensor) -> Tensor:
    """A part of a result in memory of its own without gaps, as torch gives results, as x lies.

    Gaps would be others on other ranks, and views that torch takes would be refused.
    """
    return part if part is x else part.contiguous(memory_format=memory_format(x))


def empty(x: Tensor, shape: Sequence[int], form: torch.memory_format | None = None) -> Tensor:
    """An empty tensor like x of another shape; form: default that of x."""
    if form is None:
        # as `memory_format`
        form = torch.contiguous_format if x.is_contiguous() else memory_format(x)
    if form is torch.contiguous_format:
        return x.new_empty(shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
