"""Attention over the keys of all ranks in plain products, of which every derivative exists.

It holds all keys and all scores of this rank's queries: the price of a second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from ..comm import groups, window
from ..comm.exchanges import Windows
from ..comm.sums import reduce
from .blocks import wide

# first local row, number of rows, first key among those of all ranks, number of keys, and whether
# row i sees no key behind i
Piece = tuple[int, int, int, int, bool]


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    sizes: Sequence[int],
    wanted: Windows,
    pieces: Sequence[Piece],
    scale: float,
    group: str,
    merged: str,
) -> Tensor:
    """As `ring.attend`. sizes: the keys of each rank; wanted: which of them each rank attends to.

    pieces: what these rows see of those. mask: for all of those, in their order.
    """
    if len(sizes) > 1:
        k, v = (window(x, 2, sizes, wanted, group) for x in (k, v))
    dtype, times = wide(q.dtype), q.shape[1] // max(1, k.shape[1])
    wide_q, k, v = q.to(dtype), *(x.to(dtype).repeat_interleave(times, 1) for x in (k, v))
    scores = (wide_q * scale) @ k.mT
    seen = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)
    for row, rows, key, keys, triangle in pieces:
        part = seen.new_ones(rows, keys)
        seen[row : row + rows, key : key + keys] = part.tril() if triangle else part
    if mask is not None and mask.dtype is torch.bool:
        seen = seen & mask
    elif mask is not None:
        # rounded as in the kernels: numbers of the queries' dtype
        scores = scores + mask.to(q.dtype).to(dtype)
        seen = seen & (mask > -inf)
    scores = scores.masked_fill(~seen, -inf)
    top = (
        scores.detach().amax(-1, keepdim=True)
        if scores.shape[-1]
        else scores.new_full((*scores.shape[:-1], 1), -inf)
    )
    several = groups.size(merged) > 1
    if several:
        (top,) = reduce([top], "max", merged)
    weights = (scores - top.masked_fill(top == -inf, 0.0)).exp()
    sums = [weights @ v, weights.sum(-1, keepdim=True)]
    if several:
        sums = list(reduce(sums, "sum", merged))
    return (sums[0] / sums[1].masked_fill(sums[1] == 0, 1.0)).to(q.dtype)
