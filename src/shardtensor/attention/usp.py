"""All-to-all and ring in one: heads over teams of ranks, keys around a ring of teams.

As Ulysses x ring, "USP" (arXiv 2405.07719). n ranks form n / u teams of u. Within a team tokens are
exchanged for heads, so that each rank has 1 / u of the heads for all tokens of its team; then the
ranks that have the same heads, one of each team, form a ring. It takes heads that u divides, and no
group but that of all n ranks: who is not named in an exchange gets nothing.

Under a causal mask a team has as many ranks from the front as from the back (`schedule.teams`), so
that all rings work alike and nothing has to be moved for it.
"""

from __future__ import annotations

from itertools import chain
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from ..cuts import Cut, cut, pairs
from .ring import attend
from .schedule import Spans, seated, teams


def repeats(heads: int, team: int) -> int:
    """How often each key head must be there for a team's ranks to get as many of them."""
    return lcm(heads, team) // heads


def fits(queries: int, keys: int, team: int) -> bool:
    """Whether so many heads of queries and of keys can be dealt to a team of ranks."""
    return bool(queries and keys) and queries % lcm(keys, team) == 0


def attend_in_teams(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    team: int,
    q_spans: Spans,
    k_spans: Spans,
    rows: str,
    causal: bool,
    scale: float,
    exact: bool = True,
    drop: float = 0.0,
    seed: int = 0,
    group: str,
    merged: str,
) -> Tensor:
    """softmax(scale q k^T + mask) v over the keys of all ranks, in teams of so many.

    q (B, H, L, E), k (B, G, S, E), v (B, G, S, F): this rank's shards; q_spans, k_spans: (start,
    size) of each rank's. mask: whole along the keys; rows: along the queries "own", those of this
    rank, or "whole", or "one" for all queries. drop, seed, merged: as of `ring.attend`.
    """
    seat = _seat(len(q_spans), team, causal, group)
    q_cut, k_cut = (cut(spans[r][1] for r in seat.members) for spans in (q_spans, k_spans))
    times = repeats(k.shape[1], team)
    k, v = (x if times == 1 else x.repeat_interleave(times, 1) for x in (k, v))
    # as many messages on all ranks
    alike = [n for _, n in q_spans] == [n for _, n in k_spans]
    if alike and q.shape[-1] == v.shape[-1]:
        dealt = _dealt([q, k, v], q_cut, seat)
    elif q.shape[-1] == v.shape[-1]:
        dealt = _dealt([q], q_cut, seat) + _dealt([k, v], k_cut, seat)
    else:
        each = ((q, q_cut), (k, k_cut), (v, k_cut))
        dealt = [y for x, sizes in each for y in _dealt([x], sizes, seat)]
    q_seats, k_seats = (seated(spans, seat.order, team) for spans in (q_spans, k_spans))
    if mask is not None:
        mask = _mask(mask, rows, q_spans, q_seats, seat)
    q, k, v = dealt
    out = attend(
        q, k, v, mask, q_spans=q_seats, k_spans=k_seats, causal=causal, scale=scale, exact=exact,
        drop=drop, seed=seed, order=seat.order, team=team, group=group, merged=merged,
    )  # fmt: skip
    return comm.swap(out, 1, 2, cut([out.shape[1]] * team), q_cut, group, seat.members)


class _Seat(NamedTuple):
    """Where this rank sits: its team's place in the ring, its number in the team, the team."""

    order: tuple[int, ...]
    place: int
    number: int
    members: tuple[int, ...]
    group: str


@cached
def _seat(n: int, team: int, causal: bool, group: str) -> _Seat:
    order = teams(n, team, causal)
    place, number = divmod(order.index(comm.rank(group)), team)
    return _Seat(order, place, number, order[place * team : (place + 1) * team], group)


def _dealt(xs: list[Tensor], sizes: Cut, seat: _Seat) -> list[Tensor]:
    """All tokens of a team and this rank's share of the heads of each, in one message to a rank."""
    team = len(seat.members)
    # what goes to a rank lies together
    heads = [x.shape[1] // team for x in xs]
    apart = [x.unflatten(1, (team, n)) for x, n in zip(xs, heads, strict=True)]
    together = (torch.cat(apart, 2) if len(xs) > 1 else apart[0]).flatten(1, 2)
    to = cut([sum(heads)] * team)
    return list(comm.swap(together, 2, 1, sizes, to, seat.group, seat.members).split(heads, 1))


def _mask(mask: Tensor, rows: str, spans: Spans, seats: Spans, seat: _Seat) -> Tensor:
    """The mask for this rank's heads and its team's queries, which lie at `seats`."""
    team = len(seat.members)
    heads = mask.shape[1] // team
    if rows == "own":
        if heads:
            sizes, to = cut(spans[r][1] for r in seat.members), cut([heads] * team)
            return comm.swap(mask, 2, 1, sizes, to, seat.group, seat.members)
        held = cut(n for _, n in spans)
        return comm.window(mask, 2, held, _of_teams(held, seat.order, team), seat.group)
    if heads:
        mask = mask.narrow(1, seat.number * heads, heads)
    if rows == "one":
        return mask
    each = len(seats) * team // len(spans)
    own = seats[seat.place * each : (seat.place + 1) * each]
    return torch.cat([mask.narrow(2, start, n) for start, n in own], 2)


@cached
def _of_teams(sizes: Cut, order: tuple[int, ...], team: int) -> Spans:
    """For each rank the rows of every rank of its team."""
    wanted: list[tuple[int, ...]] = [()] * len(order)
    for at, rank in enumerate(order):
        wanted[rank] = order[at - at % team :][:team]
    ranks = list(chain.from_iterable(wanted))
    return pairs(sizes.edges[:-1][ranks], sizes.edges[1:][ranks])
