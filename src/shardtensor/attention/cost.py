"""What each way of attention costs the busiest rank: counts, and the time by a model."""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import numpy as np

from ..cache import cached
from .schedule import teams


class Way(NamedTuple):
    """A strategy, and for how many ranks heads are dealt to or keys gathered: 1 for a ring."""

    kind: str
    team: int = 1


class Rates(NamedTuple):
    """How fast a rank multiplies (multiply-adds/s) and merges (elements/s), and its link.

    latency (s) of an exchange, bandwidth (bytes/s). block: what one more block of keys takes beside
    its work (s). whole: bytes of keys and values up to which a rank may have those of several.
    """

    multiply: float
    merge: float
    latency: float
    bandwidth: float
    block: float = 0.0
    whole: float = 0.0


class Work(NamedTuple):
    """Attention over shards, by facts that all ranks know.

    queries, keys: tokens of each of the ring's ranks. batch, heads, key_heads: of one rank. width,
    value_width: of a head; item: bytes of a number. mask: bytes of one rank's part of a mask that
    teams would have to exchange, whole where all heads share it.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    batch: int
    heads: int
    key_heads: int
    width: int
    value_width: int
    item: int
    causal: bool
    mask: int = 0
    shared: bool = True


class Cost(NamedTuple):
    """Of the busiest rank, forward: multiply-adds, merged elements, bytes and exchanges.

    moved: bytes that nothing hides, in `swaps` exchanges. passed: bytes that arrive while blocks
    are computed, in `hops` exchanges.
    """

    multiplied: float
    merged: float
    moved: float
    swaps: int
    passed: float
    hops: int

    def seconds(self, rates: Rates) -> float:
        """The work and, beside all blocks but the first, what is passed; and what is moved."""
        work = self.multiplied / rates.multiply + self.merged / rates.merge
        hidden = work * self.hops / (self.hops + 1)
        wait = max(0.0, self.passed / rates.bandwidth - hidden)
        latency = (self.swaps + self.hops) * rates.latency
        return work + wait + self.moved / rates.bandwidth + latency


def together(work: Work, most: float) -> list[int]:
    """How many ranks may have each other's keys and values, of most bytes; they divide all."""
    row = work.batch * work.item * work.key_heads * (work.width + work.value_width)
    n, edges, found = len(work.keys), np.array((0, *work.keys)).cumsum(), list[int]()
    for m in range(2, n + 1):
        if n % m == 0 and row * int(np.diff(edges[::m]).max()) <= most:
            found.append(m)
    return found


@cached
def pairs(work: Work) -> tuple[int, ...]:
    """How many keys the queries of each rank see, added up."""
    if not work.causal:
        return tuple(n * sum(work.keys) for n in work.queries)
    total = sum(work.keys)
    ends = np.array((0, *work.queries), dtype=object).cumsum()
    inside = np.minimum(ends, total)
    seen = inside * (inside + 1) // 2 + (ends - inside) * total
    return tuple((seen[1:] - seen[:-1]).tolist())


@cached
def cost(work: Work, way: Way) -> Cost:
    """What a way costs the busiest rank."""
    n, seen = len(work.queries), pairs(work)
    size = work.batch * work.item
    row = work.width + work.value_width
    q, k = max(work.queries), max(work.keys)
    # bytes of a rank's queries and result; of its keys and values
    own, block = size * work.heads * q * row, size * work.key_heads * k * row
    scale = work.batch * work.heads * row
    out = work.batch * work.heads * q * work.value_width
    if way.kind == "ring":
        return Cost(max(seen) * scale, (n - 1) * out, 0, 0, (n - 1) * block, n - 1)
    if way.kind == "gather":
        # some ranks' keys first, which are then a block of a ring
        m = way.team
        hops = n // m - 1
        passed = hops * m * block
        return Cost(max(seen) * scale, hops * out, (m - 1) * block, 1, passed, hops)
    if way.kind == "zigzag":
        # a chunk of two stays where it is, at best; the result comes back
        there = (own + block) * (n - 1) / n
        return Cost(sum(seen) / n * scale, 2 * (n - 1) * out, there, 2, (n - 1) * block, n - 1)
    u = way.team
    # of heads that do not divide, some ranks get one more
    most = -(-work.heads // u) * u / work.heads
    times = lcm(work.key_heads, u) // work.key_heads if most == 1 else 1
    order = np.array(teams(n, u, work.causal and u < n)).reshape(-1, u)
    busiest = max(sum(seen[r] for r in team) for team in order.tolist())
    swaps = 2 if work.queries == work.keys and work.width == work.value_width else 3
    moved = (u - 1) / u * (own + times * block) * most
    moved += (u - 1) * work.mask / (1 if work.shared else u)
    hops = n // u - 1
    return Cost(
        busiest / u * scale * most,
        hops * out,
        moved,
        swaps + (work.mask > 0),
        hops * times * block,
        hops,
    )
