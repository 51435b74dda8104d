"""How the whole of a sharded tensor would lie in memory: strides, and which reshapes are views.

A shard of one row, or of none, is contiguous in any order of its dims, and every reshape of it is a
view. So that all ranks decide alike, strides are those of the whole, in the order and with the gaps
that the local strides show.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import cached
from ..spec import Spec


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a tensor: that of images with the channels last, or contiguous."""
    if x.ndim in (4, 5) and not x.is_contiguous():
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


@cached
def strides(spec: Spec, own: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of the whole, of a local tensor of strides `own`."""
    order = sorted(range(len(own)), key=lambda d: (own[d], -d))
    found, step, dense = [0] * len(own), 1, 1
    for d in order:
        if own[d] == 0:
            continue
        # a slice of a dim leaves gaps between the rows of the next, which may be gone elsewhere
        exact = own[d] * step % dense == 0
        found[d] = (
            own[d] * step // dense if exact or own[d] < dense else step * (own[d] // dense + 1)
        )
        step = found[d] * max(1, spec.shape[d])
        dense = own[d] * max(1, spec.local_shape[d])
    return tuple(found)


@cached
def overlaps(spec: Spec, own: tuple[int, ...]) -> bool:
    """Whether elements along dims that are whole on each rank may be the same memory."""
    whole = [(s, d.size) for s, d in zip(own, spec.dims, strict=True) if not d.axes and d.size > 1]
    reach = 0
    for stride, size in sorted(whole):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def is_contiguous(local: Tensor, spec: Spec, memory_format: torch.memory_format) -> bool:
    """Whether the whole is contiguous in a memory format."""
    if not local.is_contiguous(memory_format=memory_format):
        return False
    if all(n > 1 or n == d.size for n, d in zip(local.shape, spec.dims, strict=True)):
        return True
    whole = torch.empty_strided(spec.shape, strides(spec, local.stride()), device="meta")
    return whole.is_contiguous(memory_format=memory_format)


@cached
def views(spec: Spec, own: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether torch gives the whole, which is not empty, in another shape as a view."""
    return is_view(spec.shape, strides(spec, own), target)


def is_view(shape: Sequence[int], stride: Sequence[int], target: Sequence[int]) -> bool:
    """Whether torch gives a tensor without empty dims in another shape as a view."""
    kept = [(n, s) for n, s in zip(shape, stride, strict=True) if n != 1]
    wanted = [n for n in target if n != 1]
    while kept:
        # the run of dims that lie one after the other in memory, from the last on
        size, step = kept.pop()
        run = size
        while kept and kept[-1][1] == step * size:
            size, step = kept.pop()
            run *= size
        while run > 1 and wanted and run % wanted[-1] == 0:
            run //= wanted.pop()
        if run > 1:
            return False
    return not wanted
