"""as_strided: rows of memory, said as slices and windows of dims.

A dim of the result steps through one dim of the input, of which it reads every k-th row; two that
step through the same one are windows of it, which may overlap. What runs over the end of a dim goes
on in the next, where the two lie without a gap: they are read as one. Anything else is gathered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache import cached
from ...dispatch.fallback import fall_back
from ...registry import rule
from ...spec import Spec
from ...tensor import ShardTensor, layout
from ...tensor.offset import begins_its_memory

# of the result: (dim, rows, rows of the input from one to the next)
Read = tuple[int, int, int]


@dataclass(frozen=True)
class Way:
    """order: of dims in memory; joined: dims that are then flattened with the next, in turn.

    begin, reads: of each dim that is left, its first row and its dims of the result, widest first.
    """

    order: tuple[int, ...]
    joined: tuple[int, ...]
    begin: tuple[int, ...]
    reads: tuple[tuple[Read, ...], ...]


@rule("as_strided")
def as_strided(
    input: ShardTensor, size: Sequence[int], stride: Sequence[int], storage_offset: Any = None
) -> Tensor:
    if storage_offset is None or begins_its_memory(input):
        own = layout.stride(input)
        way = _way(input._spec, own, tuple(size), tuple(stride), storage_offset or 0)
        if way is not None:
            return _read(input, way, size, stride)
    return fall_back(torch.as_strided, (input, size, stride, storage_offset), {})


@cached
def _way(
    spec: Spec, own: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...], begin: int
) -> Way | None:
    """None: no slices and windows read the same."""
    long = [d for d, n in enumerate(spec.shape) if n > 1]
    order = sorted(long, key=lambda d: -own[d])
    dims = [(spec.shape[d], own[d], bool(spec.dims[d].axes)) for d in order]
    gaps = itertools.pairwise(dims)
    if (
        len(size) != len(stride)
        or not (math.prod(spec.shape) and math.prod(size))
        or min(size, default=1) < 0
        or min((*stride, begin, *(s - 1 for _, s, _ in dims)), default=0) < 0
        or any(outer < n * inner for (_, outer, _), (n, inner, _) in gaps)
    ):
        return None
    joined: list[int] = []
    while True:
        found = _divided([s for _, s, _ in dims], size, stride, begin)
        if found is None:
            return None
        starts, reads = found
        ends = [b + _rows(r) for b, r in zip(starts, reads, strict=True)]
        over = next((d for d, end in enumerate(ends) if end > dims[d][0]), None)
        if over is None:
            return Way(tuple(order), tuple(joined), starts, reads)
        (n, step, cut), outer = dims[over], dims[over - 1]
        if not over or cut or outer[1] != n * step:
            return None
        joined.append(over - 1)
        dims[over - 1 : over + 1] = [(outer[0] * n, step, outer[2])]


def _divided(
    steps: list[int], size: tuple[int, ...], stride: tuple[int, ...], begin: int
) -> tuple[tuple[int, ...], tuple[tuple[Read, ...], ...]] | None:
    """The first row and the reads of each dim of these strides; None: it reads between rows."""
    starts = []
    for step in steps:
        starts.append(begin // step)
        begin %= step
    reads: list[list[Read]] = [[] for _ in steps]
    for out, (n, far) in enumerate(zip(size, stride, strict=True)):
        if n == 1 or far == 0:
            continue
        d = next((d for d, step in enumerate(steps) if step <= far), None)
        if d is None or far % steps[d]:
            return None
        reads[d].append((out, n, far // steps[d]))
    if begin:
        return None
    return tuple(starts), tuple(tuple(sorted(r, key=lambda read: -read[2])) for r in reads)


def _rows(reads: Sequence[Read]) -> int:
    """How many rows lie from the first to the last that is read."""
    return 1 + sum(k * (n - 1) for _, n, k in reads)


def _read(x: Tensor, way: Way, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    y = x.squeeze(tuple(d for d in range(x.ndim) if d not in way.order))
    kept = sorted(way.order)
    y = y.permute([kept.index(d) for d in way.order])
    for d in way.joined:
        y = y.flatten(d, d + 1)
    # of each dim the dim of the result that it is, or none yet
    names: list[int | None] = [None] * y.ndim
    for begin, reads in zip(way.begin, way.reads, strict=True):
        at = names.index(None)
        if not reads:
            y = y.select(at, begin)
            del names[at]
            continue
        *outer, (last, _, step) = reads
        y = y.narrow(at, begin, _rows(reads))
        for i, (out, _, k) in enumerate(outer, 1):
            y = y.unfold(at, _rows(reads[i:]), k)
            names[at] = out
            names.append(None)
            at = len(names) - 1
        y = y[(*(slice(None),) * at, slice(None, None, step))]
        names[at] = last
    there = sorted(n for n in names if n is not None)
    y = y.permute([names.index(n) for n in there])
    for out in range(len(size)):
        if out not in there:
            y = y.unsqueeze(out)
    return y.expand(*size) if 0 in stride else y
