"""Causal ring attention with equal work on all ranks.

Under a causal mask a rank with late queries sees many keys and one with early queries few: a ring
of n ranks takes 2n - 1 units of time where n would do. Here the tokens are cut into 2n chunks and
rank r works on chunks r and 2n - 1 - r (the order of Llama 3's context parallelism, arXiv
2407.21783, 3.3.2; Striped Attention, arXiv 2311.09431, balances by another). One exchange brings
queries, keys and values there, one brings the result back: at most a block of each.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from .ring import attend
from .schedule import Spans


@cached
def chunks(size: int, n: int) -> tuple[Spans, ...]:
    """Two spans (start, size) for each of n ranks: chunks r and 2n - 1 - r."""
    ends = [size * i // (2 * n) for i in range(2 * n + 1)]
    found = [(a, b - a) for a, b in pairwise(ends)]
    return tuple((found[r], found[-1 - r]) for r in range(n))


@cached
def _windows(sizes: tuple[int, ...]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges that each rank asks for: of the shards; of the chunks in the order of the ranks."""
    n = len(sizes)
    order = [span for spans in chunks(sum(sizes), n) for span in spans]
    there = [(a, a + rows) for a, rows in order]
    # where each chunk begins in the order of the ranks
    begins = dict(zip(order, accumulate((rows for _, rows in order), initial=0), strict=False))
    back = []
    for start, stop in pairwise(accumulate(sizes, initial=0)):
        for chunk, rows in sorted(order):
            a, b = max(start, chunk), min(stop, chunk + rows)
            first = begins[chunk, rows] - chunk
            back.append((a + first, b + first) if a < b else (0, 0))
    return there, back


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
    n = len(sizes)
    there, back = _windows(sizes)
    if q.shape[-1] == v.shape[-1]:
        heads = [x.shape[1] for x in (q, k, v)]
        moved = comm.window(torch.cat((q, k, v), 1), 2, sizes, there, group)
        q, k, v = moved.split(heads, 1)
    else:
        q, k, v = (comm.window(x, 2, sizes, there, group) for x in (q, k, v))
    spans = [span for pair in chunks(sum(sizes), n) for span in pair]
    out = attend(
        q, k, v, None, q_spans=spans, k_spans=spans, causal=True, scale=scale, exact=exact,
        group=group, merged=alone,
    )  # fmt: skip
    held = [sum(rows for _, rows in pair) for pair in chunks(sum(sizes), n)]
    return comm.window(out, 2, held, back, group)
