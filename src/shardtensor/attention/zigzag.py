"""Causal ring attention with equal work on all ranks.

Under a causal mask a rank with late queries sees many keys and one with early queries few: a ring
of n ranks takes 2n - 1 units of time where n would do. Here the tokens are cut into 2n chunks and
rank r works on chunks r and 2n - 1 - r (the order of Llama 3's context parallelism, arXiv
2407.21783, 3.3.2; Striped Attention, arXiv 2311.09431, balances by another). One exchange brings
queries, keys and values there, one brings the result back: at most a block of each.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from ..cuts import Cut, Kept, cut, pairs, table
from .ring import attend
from .schedule import Spans


@cached
def chunks(size: int, n: int) -> tuple[Spans, ...]:
    """Two spans (start, size) for each of n ranks: chunks r and 2n - 1 - r."""
    ends = [size * i // (2 * n) for i in range(2 * n + 1)]
    found = [(a, b - a) for a, b in pairwise(ends)]
    return tuple((found[r], found[-1 - r]) for r in range(n))


@cached
def _windows(sizes: tuple[int, ...]) -> tuple[Kept[Any], Kept[Any], Kept[Any], Cut]:
    """Ranges that each rank asks for: of the shards; of the chunks in the order of the ranks.

    Also the spans of these chunks, and how many tokens each rank has of them.
    """
    sizes = cut(sizes)
    n = len(sizes)
    order = Kept(chain.from_iterable(chunks(sizes.offsets[-1], n)))
    starts, rows = table(order).T
    # where each chunk begins in the order of the ranks, from where it begins among all tokens
    shift = rows.cumsum() - rows - starts
    by = np.lexsort((rows, starts))
    begin, end, shift = starts[by], (starts + rows)[by], shift[by]
    low, high = sizes.edges[:-1, None], sizes.edges[1:, None]
    first, behind = np.searchsorted(end, low, "right"), np.searchsorted(begin, high)
    # as many chunks for each shard
    at = first + np.arange(max(1, int((behind - first).max())))
    known = at.clip(max=2 * n - 1)
    a, b = np.maximum(low, begin[known]), np.minimum(high, end[known])
    has = (at < behind) & (a < b)
    back = pairs(np.where(has, a + shift[known], 0), np.where(has, b + shift[known], 0))
    return pairs(starts, starts + rows), back, order, cut(rows.reshape(n, 2).sum(1).tolist())


def attend_balanced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sizes: tuple[int, ...],
    scale: float,
    exact: bool = True,
    group: str,
    alone: str,
) -> Tensor:
    """softmax(scale q k^T) v under a causal mask, over the tokens of all ranks of the ring.

    q (B, H, L, E), k (B, G, L, E), v (B, G, L, F): this rank's shards of queries and keys, which
    have the same `sizes`. alone: a group of this rank.
    """
    there, back, spans, held = _windows(sizes)
    if q.shape[-1] == v.shape[-1]:
        heads = [x.shape[1] for x in (q, k, v)]
        moved = comm.window(torch.cat((q, k, v), 1), 2, sizes, there, group)
        q, k, v = moved.split(heads, 1)
    else:
        q, k, v = (comm.window(x, 2, sizes, there, group) for x in (q, k, v))
    out = attend(
        q, k, v, None, q_spans=spans, k_spans=spans, causal=True, scale=scale, exact=exact,
        group=group, merged=alone,
    )  # fmt: skip
    return comm.window(out, 2, held, back, group)
