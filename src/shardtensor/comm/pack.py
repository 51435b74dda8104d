"""A tensor's parts for all ranks as one vector, and back: one pass over memory, few kernels.

Shards of the same size beside each other are moved by one kernel, so what torch.chunk cuts takes
two of them, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import _torch
from .._torch import probe
from ..cache import cached
from ..cuts import Cut


def numel_but(shape: Sequence[int], *dims: int) -> int:
    """The elements of a tensor for one row of each of these dims."""
    n = 1
    for d, size in enumerate(shape):
        if d not in dims:
            n *= size
    return n


def leads(shape: Sequence[int], dim: int) -> bool:
    """Whether the dims before this one have one element: its rows lie one after the other."""
    return all(n == 1 for n in shape[:dim])


@cached
def _runs(sizes: Cut, but: int) -> tuple[tuple[int, int, int, int], ...]:
    """(first shard, shards, size, rows of shards before that are moved) without shard `but`."""
    found, before = [], 0
    for first, count, size in sizes.runs:
        ends = [first, first + count]
        if first <= but < first + count:
            ends = [first, but, but + 1, first + count]
        for a, b in zip(ends[::2], ends[1::2], strict=True):
            if a < b:
                found.append((a, b - a, size, before))
                before += (b - a) * size
    return tuple(found)


def _each(x: Tensor, dim: int, sizes: Cut, but: int) -> Iterator[tuple[Tensor, int, int, int, int]]:
    """For each run of shards its rows (shards, ..., size, ...) of x, and the run."""
    for first, count, size, before in _runs(sizes, but):
        rows = x.narrow(dim, sizes.offsets[first], count * size)
        yield rows.unflatten(dim, (count, size)).movedim(dim, 0), first, count, size, before


def packed(x: Tensor, dim: int, sizes: Cut, but: int) -> Tensor:
    """The shards along dim one after the other, without shard `but` (-1: all): one vector."""
    rest, left = numel_but(x.shape, dim), sizes[but] if but >= 0 else 0
    if leads(x.shape, dim) and but in (-1, 0, len(sizes) - 1):
        # they lie so
        return x.narrow(dim, left if but == 0 else 0, x.shape[dim] - left).reshape(-1)
    out = x.new_empty(rest * (x.shape[dim] - left))
    for rows, _, count, size, before in _each(x, dim, sizes, but):
        into = out[rest * before : rest * (before + count * size)]
        into.view(rows.shape).copy_(rows)
    return out


def unpacked(flat: Tensor, out: Tensor, dim: int, sizes: Cut, but: int = -1) -> Tensor:
    """`out` with its shards along dim, but for shard `but`, from one vector.

    flat may also be rows, one for each shard, of which longer ones end in what is not needed.
    """
    rest = numel_but(out.shape, dim)
    for rows, first, count, size, before in _each(out, dim, sizes, but):
        if flat.ndim > 1:
            part = flat[first : first + count, : rest * size]
        else:
            part = flat[rest * before : rest * (before + count * size)]
        rows.copy_(part.view(rows.shape))
    return out


def joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The elements of tensors one after the other: as they lie, else copied at once."""
    if len(parts) < 2:
        return parts[0].contiguous().view(-1) if parts else like.new_empty(0)
    first = parts[0]
    if not (_torch.is_tracing() or _torch.transforming()) and _adjacent(parts):
        return first.as_strided((sum([x.numel() for x in parts]),), (1,))
    rest = first.shape[1:]
    for x in parts:
        if not x.ndim or x.shape[1:] != rest:
            return torch.cat([x.reshape(-1) for x in parts])
    # one kernel, whatever their strides
    return torch.cat(parts).reshape(-1)


def _adjacent(parts: list[Tensor]) -> bool:
    """Whether each tensor begins where the one before it ends, as what came in one message does."""
    at, memory = -1, 0
    for x in parts:
        if type(x) not in probe.LIES:
            return False
        # by name, not address: what a pager put away has none
        own, begin = x.untyped_storage()._cdata, int(x.storage_offset()) * x.element_size()
        if at < 0:
            memory, at = own, begin
        if begin != at or not x.is_contiguous() or x.is_conj() or x.is_neg():
            return False
        at += x.numel() * x.element_size()
        if own != memory:
            return False
    return True


@cached
def others(n: int, each: int, but: int) -> list[int]:
    """The same number for each of n ranks, none for rank `but`."""
    return [0 if r == but else each for r in range(n)]
