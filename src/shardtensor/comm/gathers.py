"""Several all-gathers of one dtype in one message: small tensors, each cut along its own dim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..cuts import Cut
from . import wire
from .ops import gather
from .pack import numel_but

# bytes of a whole tensor from which on it travels by itself, straight to where it will lie
ALONE = 2**20


def gathered(
    xs: Sequence[Tensor], dims: Sequence[int], sizes: Sequence[Cut], group: str
) -> list[Tensor]:
    """The whole tensors from their shards: xs[i] is cut along dims[i] into sizes[i].

    Outside of autograd.
    """
    found: list[Tensor] = []
    small: list[int] = []
    for i, (x, dim, cut) in enumerate(zip(xs, dims, sizes, strict=True)):
        shape = [*x.shape[:dim], cut.offsets[-1], *x.shape[dim + 1 :]]
        nbytes = numel_but(x.shape, dim) * cut.offsets[-1] * x.element_size()
        if nbytes < ALONE and len(xs) > 1:
            small.append(i)
            found.append(x.new_empty(shape))
        else:
            found.append(gather(x, dim, cut, group))
    if small:
        flat = torch.cat([xs[i].reshape(-1) for i in small])
        rests = [numel_but(xs[i].shape, dims[i]) for i in small]
        cuts = list(zip(*(sizes[i] for i in small), strict=True))
        lengths = [sum(a * b for a, b in zip(rests, of, strict=True)) for of in cuts]
        for first, rows in _rows(flat, lengths, cuts, group):
            at, count = 0, rows.shape[0]
            for i, rest, size in zip(small, rests, cuts[first], strict=True):
                d = dims[i]
                into = found[i].narrow(d, sizes[i].offsets[first], count * size)
                into = into.unflatten(d, (count, size)).movedim(d, 0)
                into.copy_(rows[:, at : at + rest * size].view(into.shape))
                at += rest * size
    return found


def _rows(
    flat: Tensor, lengths: Sequence[int], alike: Sequence[tuple[int, ...]], group: str
) -> Iterator[tuple[int, Tensor]]:
    """(the first rank, their vectors as rows) of ranks beside each other that have alike ones."""
    if wire.direct(flat, max(lengths), len(lengths)):
        parts = wire.all_gather(flat, [[n] for n in lengths], group)
        yield from ((r, part[None]) for r, part in enumerate(parts))
        return
    every = wire.all_gather_rows(flat, lengths, max(lengths), group)
    first = 0
    for _, run in groupby(alike):
        count = len(list(run))
        yield first, every[first : first + count]
        first += count
