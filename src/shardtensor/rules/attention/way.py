"""Which way attention over sharded queries and keys goes: what specs permit, and costs least."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

from ...attention import Rates, Way, Work, cheapest, fits
from ...cache import cached
from ...cuts import Cut, chunk_sizes, cut
from ...errors import UnsupportedOpError
from ...spec import Dim, Spec
from ..labels import Known
from .plan import NAME, Plan, dims_of, spans

RING = Way("ring")


@cached
def way(
    p: Plan,
    dropout: bool,
    causal: bool,
    items: tuple[int, int],
    kind: str,
    rates: Rates,
) -> Way:
    """How keys meet queries along `p.ring`; "all_to_all" is that of `dealt_along`.

    items: bytes of a number and of an entry of the mask. kind: the strategy in force.
    """
    if kind == "ring":
        return RING
    n = prod(p.spec.mesh.size(a) for a in p.ring)
    if kind == "gather":
        if not _in_order(p):
            raise UnsupportedOpError(
                f"{NAME}: strategy('gather') for keys that lie along mesh axes {p.keys.axes}, of "
                f"which queries have {p.ring} only; leave the choice to 'auto'"
            )
        return Way(kind, n)
    *operands, mask = p.operands
    plain = mask is None and not dropout
    found = _in_teams(p, n)
    axis = dealt_along(p) if plain else None
    # all ranks are one team; torch's own kernel where one mesh axis has them
    whole = [t for t in found if t.team == n]
    if axis is not None and p.spec.mesh.size(axis) == n:
        whole = [Way("all_to_all", n)]
    if kind == "all_to_all":
        whole = whole or [Way(kind, p.spec.mesh.size(a)) for a in (axis,) if a is not None]
        if not whole:
            raise _cannot_be_dealt(p, operands, kind, "the ranks")
        return whole[0]
    several = [t for t in found if t.team < n]
    work = _work(p, operands, mask, causal, items, n)
    if kind == "usp":
        if not found:
            raise _cannot_be_dealt(p, operands, kind, "teams of the ranks")
        return cheapest(work, several or found, rates)
    balanced = _balanced(p, n, plain, kind) if causal else RING
    if kind == "zigzag":
        return balanced
    gathers = not dropout and _in_order(p)
    if gathers and _exceeds_keys(p, work, items[1]):
        # each row in one block, as on one device: several would be counted, each by a second call
        return cheapest(work, [*whole, Way("gather", n)], rates)
    return cheapest(work, [RING, balanced, *several, *whole], rates, gathers=gathers)


def _exceeds_keys(p: Plan, work: Work, item: int) -> bool:
    """Whether a rank of a GPU has more bytes of a mask of numbers than all keys and values are."""
    mask = p.wanted[3]
    # a boolean one has numbers of one byte
    if mask is None or item == 1 or p.machines[0] == "cpu":
        return False
    keys = work.batch * work.key_heads * (work.width + work.value_width) * sum(work.keys)
    return item * prod(max(_sizes(d)) for d in mask) >= work.item * keys


def _in_order(p: Plan) -> bool:
    """Whether the ranks of the ring have one span of keys after the other, which are all."""
    _, keys = spans(p)
    return not p.merged and all(sum(a) == b[0] for a, b in pairwise(keys))


def _cannot_be_dealt(p: Plan, operands: Any, kind: str, to: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"{NAME}: strategy('{kind}') for heads of "
        f"{[tuple(d.size for d in dims_of(x)) for x in operands]}, which cannot be dealt "
        f"to {to} along mesh axes {p.ring}; leave the choice to 'auto'"
    )


def _balanced(p: Plan, n: int, plain: bool, kind: str) -> Way:
    """The zigzag where tokens can be dealt out anew."""
    # sizes of 1 among the mesh axes change nothing
    alike = p.spec.dims[-2] == p.keys and len(p.keys.sizes) == n
    if alike and plain and not p.merged:
        return Way("zigzag")
    if kind == "zigzag":
        raise UnsupportedOpError(
            f"{NAME}: strategy('zigzag') with a mask, with dropout or for queries and keys that "
            "are not sharded alike; leave the choice to 'auto'"
        )
    return RING


def _in_teams(p: Plan, n: int) -> list[Way]:
    """The teams of ranks to which heads can be dealt, on whatever other axes they are sharded."""
    heads = _heads(p)
    sizes = [u for u in range(2, min(n, max(h for h, _ in heads)) + 1) if n % u == 0]
    return [Way("usp", u) for u in sizes if all(fits(q, k, u) for q, k in heads)]


def _heads(p: Plan) -> list[tuple[int, int]]:
    """How many heads of queries and of keys each shard of the heads has."""
    if len(p.spec.dims) < 3:
        return [(1, 1)]
    queries = _sizes(p.spec.dims[-3])
    keys, values = (_sizes(x[-3]) if len(x) > 2 else (1,) for x in p.wanted[1:3])
    if keys != values:
        keys = queries
    return list(zip(queries, keys * len(queries) if len(keys) == 1 else keys, strict=True))


def _sizes(d: Dim) -> tuple[int, ...]:
    return tuple(d.sizes) if d.axes else (d.size,)


def _tokens(d: Dim, n: int) -> Cut:
    """The sizes along the ring; even ones where other mesh axes cut the tokens, too."""
    if len(d.sizes) == n:
        return cut(d.sizes)
    return chunk_sizes(-(-d.size * n // max(1, len(d.sizes))), n)


def _work(
    p: Plan, operands: Any, mask: Known | None, causal: bool, items: tuple[int, int], n: int
) -> Work:
    heads, key_heads = max(_heads(p))
    exchanged, shared = 0, True
    if isinstance(mask, Spec) and mask.dims[-2].size > 1:
        shared = len(mask.dims) < 3 or mask.dims[-3].size == 1
        exchanged = items[1] * prod(d.size for d in mask.dims) // n
    return Work(
        _tokens(p.spec.dims[-2], n),
        _tokens(p.keys, n),
        prod(max(_sizes(d)) for d in p.spec.dims[:-3]),
        heads,
        key_heads,
        dims_of(operands[0])[-1].size,
        p.spec.dims[-1].size,
        items[0],
        causal,
        exchanged,
        shared,
    )


@cached
def dealt_along(p: Plan) -> int | None:
    """The last mesh axis of queries and keys, if its ranks can share the heads out among them."""
    q, k, v, _ = p.operands
    queries, heads = p.spec.dims[-2], p.spec.dims[-3] if len(p.spec.dims) > 2 else None
    if heads is None or heads.axes or min(len(dims_of(x)) for x in (q, k, v)) < 3:
        return None
    axis = queries.axes[-1]
    if axis != p.keys.axes[-1:][0] or axis not in p.ring:
        return None
    n = p.spec.mesh.size(axis)
    every = [dims_of(x)[-3].size for x in (q, k, v)]
    alike = len(set(every)) == 1 and every[0] >= n
    return axis if alike or all(h % n == 0 for h in every) else None
