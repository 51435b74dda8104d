"""Ring attention as a dispatcher op: keys and values travel, queries stay (arXiv 2310.01889).

Rank r of `group` holds the queries [q_starts[r], + q_sizes[r]) and, before the first step, the keys
[k_starts[r], + k_sizes[r]) of the ring. At each step every rank attends to the block that it has
while the next one arrives. Ranks of `merged` hold other keys for the same queries: their results
are merged at the end by two all-reduces.

Backward recomputes the scores block by block from the merged log-sum-exp. Gradients of a block of
keys travel along with it, and from the last rank that needs it straight home. Memory is that of
three blocks, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..comm import groups, wire
from ..comm.ops import _define as define
from .blocks import Merge, Rule, backward, forward, wide
from .plan import hops, pieces

Ints = Sequence[int]


@dataclass(frozen=True)
class _Ring:
    """The integers of one call, the same on every rank of the ring but for `me`."""

    q_starts: tuple[int, ...]
    q_sizes: tuple[int, ...]
    k_starts: tuple[int, ...]
    k_sizes: tuple[int, ...]
    mask_start: int
    causal: bool
    scale: float
    drop: float
    seed: int
    group: str

    @property
    def me(self) -> int:
        return groups.rank(self.group)

    @property
    def hops(self) -> tuple[int, ...]:
        return hops(self.q_starts, self.q_sizes, self.k_starts, self.k_sizes, self.causal)

    def held(self, rank: int, step: int) -> int:
        """The block that a rank may hold after `step` hops."""
        return (rank - step) % len(self.k_sizes)

    def seen(self, q: Tensor, block: int) -> list[tuple[tuple[int, int], tuple[int, int], Rule]]:
        """Rows, keys and rule of each piece of a block that this rank computes."""
        shift = self.q_starts[self.me] - self.k_starts[block] if self.causal else None
        # ranks may have no queries for other reasons than tokens: an empty shard of the batch
        found = pieces(q.shape[2], self.k_sizes[block], shift) if q.numel() else ()
        return [
            (p.rows, p.keys, Rule(self.scale, p.triangle, self.drop, self._seed(block, n)))
            for n, p in enumerate(found)
        ]

    def _seed(self, block: int, piece: int) -> int:
        return (self.seed + 3 * block + piece) % 2**63

    def mask(self, mask: Tensor | None, block: int, rows: Any, keys: Any) -> Tensor | None:
        """The part of the mask that a piece meets."""
        if mask is None:
            return None
        if mask.shape[-1] > 1:
            first = self.k_starts[block] - self.mask_start
            mask = mask[..., first + keys[0] : first + keys[1]]
        return mask if mask.shape[-2] == 1 else mask[..., rows[0] : rows[1], :]


def _cut(x: Tensor, rows: tuple[int, int]) -> Tensor:
    return x[:, :, rows[0] : rows[1]]


def _post(
    ring: _Ring, to: int | None, parts: list[Tensor], arrivals: dict[int, Any], like: Tensor
) -> Callable[[], dict[int, list[Tensor]]]:
    """Send parts to one rank; what is called then gives the tensors that came, by sender."""
    n = len(ring.k_sizes)
    sends = [parts if r == to else [] for r in range(n)]
    shapes = [arrivals.get(r, []) for r in range(n)]
    wait = wire.start_exchange(sends, shapes, like, ring.group, "ring")

    def arrived() -> dict[int, list[Tensor]]:
        return {r: found for r, found in enumerate(wait()) if r in arrivals}

    return arrived


def _pass_on(
    ring: _Ring, step: int, held: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """Start hop number `step` of every block that still has to travel."""
    n, me = len(ring.k_sizes), ring.me
    travels = step < ring.hops[ring.held(me, step)]
    before, coming = (me - 1) % n, ring.held(me, step + 1)
    arrivals = {}
    if step < ring.hops[coming]:
        arrivals[before] = [_tokens(x, ring.k_sizes[coming]) for x in held]
    wait = _post(ring, (me + 1) % n if travels else None, held if travels else [], arrivals, held[0])
    return lambda: wait().get(before, [x.new_empty(_tokens(x, 0)) for x in held])


def _tokens(x: Tensor, n: int) -> list[int]:
    return [*x.shape[:2], n, x.shape[3]]
