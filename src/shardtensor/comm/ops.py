"""The collectives: dispatcher ops, each with its adjoint, for any sizes and dtypes.

| op            | forward                                | adjoint                          |
|---------------|----------------------------------------|----------------------------------|
| vary          | Replicate or plain meets sharded: identity | reduce (both in `sums`)      |
| reduce        | Partial to Replicate: all-reduce       | vary                             |
| gather        | Shard to Replicate: uneven all-gather  | split                            |
| split         | Replicate to Shard: own slice          | gather                           |
| window        | Shard to global ranges, may overlap    | window_add                       |
| window_add    | pieces back to their owners, added     | window                           |
| swap          | Shard(i) to Shard(j): all-to-all       | swap back                        |
| ring          | pass blocks `shift` ranks on           | ring by -shift                   |
| take          | rows by global index                   | put                              |
| put           | rows added at global indices           | take                             |
| addend        | Replicate to Partial: on the first rank | alike                           |
| alike         | cotangents of addends to Replicate     | addend                           |

Reduce-scatter (Partial to Shard) is `window_add` with every rank's range the whole dim; its
adjoint is then the all-gather that the design asks for. Cotangents: that of a shard is the shard of
the cotangent; that of a replicated value is whole and the same on each rank; that of an addend is
the whole cotangent. The collectives run over `group`, a name from `groups.group`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..cache import cached
from ..cuts import Cut, cut
from . import groups, wire
from .define import paired
from .exchanges import Exchange, exchange, spread, windows_of
from .formats import empty, memory_format
from .pack import leads, numel_but, others, packed, unpacked
from .parcels import back, there

Ints = Sequence[int]
# ranks whose shards a gather moves together one by one
MOVED = 64
# bytes of a whole tensor from which on it is gathered in parts, and in how many
LARGE, PARTS = 2**28, 8
# bytes of a rank's share of what is swapped from which on it goes in parts, and in how many
LARGE_SHARE, SLABS = 2**26, 4


def _resized(shape: Ints, dim: int, n: int) -> list[int]:
    found = list(shape)
    found[dim] = n
    return found


# adjoints call what is defined below them
gather: Callable[..., Tensor]
split: Callable[..., Tensor]
window: Callable[..., Tensor]
window_add: Callable[..., Tensor]
swap: Callable[..., Tensor]
ring: Callable[..., Tensor]


# gather and split --------------------------------------------------------------------------------


def _gather(x: Tensor, dim: int, sizes: Cut, group: str) -> Tensor:
    n, shape = len(sizes), list(x.shape)
    rest = numel_but(shape, dim)
    flat, most = x.contiguous().reshape(-1), rest * max(sizes)
    if wire.direct(flat, most, n):
        shapes = [_resized(shape, dim, k) for k in sizes]
        parts = wire.all_gather(flat, shapes, group)
        return torch.cat(parts, dim, out=empty(x, _resized(shape, dim, sizes.offsets[-1])))
    if 2 * sizes.offsets[-1] <= (n - 1) * max(sizes):
        return _gather_by_sum(x, dim, sizes, group)
    lead = numel_but(shape, *range(dim, len(shape)))
    if lead > 1 and rest * sizes.offsets[-1] * x.element_size() >= LARGE:
        return _gather_in_parts(flat, _resized(shape, dim, sizes.offsets[-1]), lead, sizes, group)
    rows = wire.all_gather_rows(flat, spread(sizes, rest, -1), most, group)
    if lead == 1 and (_in_order(sizes) or n <= MOVED):
        # they came in order: no second whole tensor; results of a dispatcher op may not be views
        found = _closed_up(rows, sizes, rest)
        return found.view(_resized(shape, dim, sizes.offsets[-1])).data
    return unpacked(rows, empty(x, _resized(shape, dim, sizes.offsets[-1])), dim, sizes)


def _gather_by_sum(x: Tensor, dim: int, sizes: Cut, group: str) -> Tensor:
    """A gather where most ranks have few rows or none: padded to the longest they would be more."""
    me, shape = groups.facts[group].rank, _resized(x.shape, dim, sizes.offsets[-1])
    flat = x.new_zeros(prod(shape))
    found = flat.view(shape)
    found.narrow(dim, sizes.offsets[me], sizes[me]).copy_(x)
    # bits and zeros add up to the bits
    bits = flat.view(torch.int32 if x.element_size() >= 4 else torch.uint8)
    wire.start_all_reduce(bits, "sum", group, [bits.numel()])()
    # results of a dispatcher op may not be views
    kept = memory_format(x) is torch.contiguous_format
    return found.data if kept else empty(x, shape).copy_(found)


def _gather_in_parts(flat: Tensor, shape: Ints, lead: int, sizes: Cut, group: str) -> Tensor:
    """A gather by a part of the dims before the cut one at a time: no second whole tensor."""
    out = flat.new_empty(shape)
    own, into = flat.view(lead, -1), out.view(lead, sizes.offsets[-1], -1)
    step = -(-lead // PARTS)
    for a in range(0, lead, step):
        part = into[a : a + step]
        rest = numel_but(part.shape, 1)
        mine, most = own[a : a + step].reshape(-1), rest * max(sizes)
        # no name that would hold the rows of one part while the next one's come
        unpacked(wire.all_gather_rows(mine, spread(sizes, rest, -1), most, group), part, 1, sizes)
    return out


def _closed_up(rows: Tensor, sizes: Cut, rest: int) -> Tensor:
    """The shards of a padded gather, one after the other, in the same memory."""
    flat = rows.view(-1)
    for r, (size, start) in enumerate(zip(sizes, sizes.offsets, strict=False)):
        a, k = start * rest, size * rest
        if k and a != r * rows.shape[1]:
            # old and new place overlap
            flat[a : a + k] = rows[r, :k].clone()
    return flat[: rest * sizes.offsets[-1]]


@cached
def _in_order(sizes: Cut) -> bool:
    """Whether only the last shard that has rows is shorter than the first."""
    first, last = max(sizes), sizes.offsets[-1]
    return all(a == min(i * first, last) for i, a in enumerate(sizes.offsets))


def _split(x: Tensor, dim: int, sizes: Cut, group: str) -> Tensor:
    me = groups.facts[group].rank
    own = x.narrow(dim, sizes.offsets[me], sizes[me])
    return empty(x, own.shape).copy_(own)


def _lift_cut(dim: int, sizes: Ints, group: str) -> tuple[Any, ...]:
    return dim, cut(sizes), group


def _lower_cut(dim: int, sizes: Cut, group: str) -> tuple[Any, ...]:
    return dim, list(sizes), group


gather, gather_op = paired(
    "gather(Tensor x, int dim, int[] sizes, str group) -> Tensor",
    _gather,
    lambda x, dim, sizes, group: empty(x, _resized(x.shape, dim, sizes.offsets[-1])),
    lambda g, *facts: split(g, *facts),
    _lift_cut,
    _lower_cut,
)
split, split_op = paired(
    "split(Tensor x, int dim, int[] sizes, str group) -> Tensor",
    _split,
    lambda x, dim, sizes, group: empty(x, _resized(x.shape, dim, sizes[groups.facts[group].rank])),
    gather,
    _lift_cut,
    _lower_cut,
)


# window ------------------------------------------------------------------------------------------


def _window(x: Tensor, dim: int, plan: Exchange, fill: float, group: str) -> Tensor:
    """This rank's rows of the plan along a dim; beyond its ends fill or wrap."""
    me = groups.facts[group].rank
    if plan.whole:
        return _gather(x, dim, plan.sizes, group)
    moves = there(plan, dim, x.shape, x.element_size(), me)
    came: Sequence[Tensor] = ()
    if plan.communicates:
        parts = [x.narrow(dim, *rows) for rows in moves.sends]
        came = wire.start_parcels(parts, moves.parcels, x, group, "window", wait=True)()
    out = empty(x, moves.shape)
    for to, start, n in moves.own:
        out.narrow(dim, to, n).copy_(x.narrow(dim, start, n))
    for rows, part in zip(moves.came, came, strict=True):
        out.narrow(dim, *rows).copy_(part)
    for rows in moves.fills:
        out.narrow(dim, *rows).fill_(fill)
    return out


def _window_add(g: Tensor, dim: int, plan: Exchange, group: str) -> Tensor:
    """The adjoint of `_window`: rows of windows go home, where they are added up."""
    me = groups.facts[group].rank
    if plan.whole:
        return _reduce_scatter(g, dim, plan.sizes, group)
    moves = back(plan, dim, g.shape, g.element_size(), me)
    out = empty(g, moves.shape)
    if moves.alone:
        out.copy_(g.narrow(dim, moves.own[0][1], moves.own[0][2]))
    else:
        out.zero_()
        for to, start, n in moves.own:
            out.narrow(dim, to, n).add_(g.narrow(dim, start, n))
    if plan.communicates:
        parts = [g.narrow(dim, *rows) for rows in moves.sends]
        came = wire.start_parcels(parts, moves.parcels, g, group, "window_add", wait=True)()
        for rows, part in zip(moves.came, came, strict=True):
            out.narrow(dim, *rows).add_(part)
    return out


def _reduce_scatter(g: Tensor, dim: int, sizes: Cut, group: str) -> Tensor:
    """The sum of what every rank has for this one's shard, in the order of the ranks."""
    if g.dtype not in wire.ADDED:
        return _split(wire.all_reduce([g], "sum", group)[0], dim, sizes, group)
    n, me = len(sizes), groups.facts[group].rank
    rest = numel_but(g.shape, dim)
    item = g.element_size()
    own = g.narrow(dim, sizes.offsets[me], sizes[me])
    received = g.new_empty((n - 1) * own.numel())
    wire.start_all_to_all(
        received,
        packed(g, dim, sizes, me),
        others(n, own.numel() * item, me),
        spread(sizes, rest * item, me),
        group,
        "window_add",
    )()
    parts = received.view(n - 1, *own.shape)
    total = (parts[0] if n == 2 else parts.sum(0, dtype=g.dtype)).add_(own)
    return total if g.is_contiguous() else empty(g, own.shape).copy_(total)


def _lift_window(*args: Any) -> tuple[Any, ...]:
    dim, sizes, starts, stops, wrap, *rest = args
    me = groups.rank(rest[-1])
    return dim, exchange(cut(sizes), windows_of(starts, stops), wrap, me), *rest


def _lower_window(dim: int, plan: Exchange, *rest: Any) -> tuple[Any, ...]:
    starts, stops = zip(*plan.windows, strict=True)
    return dim, list(plan.sizes), list(starts), list(stops), plan.wrap, *rest


window, window_op = paired(
    "window(Tensor x, int dim, int[] sizes, int[] starts, int[] stops, bool wrap, float fill, "
    "str group) -> Tensor",
    _window,
    lambda x, dim, plan, fill, group: empty(x, _resized(x.shape, dim, plan.rows)),
    lambda g, dim, plan, fill, group: window_add(g, dim, plan, group),
    _lift_window,
    _lower_window,
)
window_add, window_add_op = paired(
    "window_add(Tensor g, int dim, int[] sizes, int[] starts, int[] stops, bool wrap, str group)"
    " -> Tensor",
    _window_add,
    lambda g, dim, plan, group: empty(
        g, _resized(g.shape, dim, plan.sizes[groups.facts[group].rank])
    ),
    lambda g, dim, plan, group: window(g, dim, plan, 0.0, group),
    _lift_window,
    _lower_window,
)


# swap --------------------------------------------------------------------------------------------


def _swap(
    x: Tensor, old: int, new: int, old_sizes: Cut, new_sizes: Cut, among: Ints, group: str
) -> Tensor:
    me = _place(among, group)
    shape = _resized(_resized(x.shape, old, old_sizes.offsets[-1]), new, new_sizes[me])
    rest = [n if d not in (old, new) else 1 for d, n in enumerate(x.shape)]
    share = old_sizes.offsets[-1] * new_sizes.offsets[-1] * x.element_size() / len(old_sizes)
    # as many messages on all ranks: some of them do not know how much the others have
    if 0 < len(among) < groups.size(group) or prod(rest) * share < LARGE_SHARE or max(rest) < SLABS:
        return _swapped(x, old, new, old_sizes, new_sizes, shape, among, group)
    out = empty(x, shape)
    slabs = rest.index(max(rest))
    step = -(-rest[slabs] // SLABS)
    for a in range(0, rest[slabs], step):
        n = min(step, rest[slabs] - a)
        part, into = x.narrow(slabs, a, n), out.narrow(slabs, a, n)
        _swapped(part, old, new, old_sizes, new_sizes, list(into.shape), among, group, into)
    return out


def _swapped(
    x: Tensor,
    old: int,
    new: int,
    old_sizes: Cut,
    new_sizes: Cut,
    shape: list[int],
    among: Ints,
    group: str,
    out: Tensor | None = None,
) -> Tensor:
    """A swap in one message, into `out` if that is given."""
    me, item = _place(among, group), x.element_size()
    rows, columns = old_sizes[me], new_sizes[me]
    own = x.narrow(new, new_sizes.offsets[me], columns)
    rest = numel_but(x.shape, old, new) * item
    # without this rank's own part, but where kernels count more than a copy of it
    but = -1 if not among and _sends_own(x) else me
    gets, gives = spread(old_sizes, rest * columns, but), spread(new_sizes, rest * rows, but)
    received = x.new_empty(prod(shape) - (own.numel() if but >= 0 else 0))
    send = packed(x, new, new_sizes, but)
    arrived = wire.start_all_to_all(received, send, gets, gives, group, "swap", among)
    if (
        out is None
        and but < 0
        and leads(shape, old)
        and memory_format(x) is torch.contiguous_format
    ):
        arrived()
        # it came in order; results of a dispatcher op may not be views
        return received.view(shape).data
    out = empty(x, shape) if out is None else out
    if but >= 0:
        # while the others' travel
        out.narrow(old, old_sizes.offsets[me], rows).copy_(own)
    arrived()
    return unpacked(received, out, old, old_sizes, but)


def _sends_own(x: Tensor) -> bool:
    return x.device.type != "cpu"


def _place(among: Ints, group: str) -> int:
    """This rank's number among some ranks of a group; none: all."""
    rank = groups.facts[group].rank
    return among.index(rank) if among else rank


def _swap_fake(
    x: Tensor, old: int, new: int, old_sizes: Cut, new_sizes: Cut, among: Ints, group: str
) -> Tensor:
    whole = _resized(x.shape, old, old_sizes.offsets[-1])
    return empty(x, _resized(whole, new, new_sizes[_place(among, group)]))


swap, swap_op = paired(
    "swap(Tensor x, int old, int new, int[] old_sizes, int[] new_sizes, int[] among, str group)"
    " -> Tensor",
    _swap,
    _swap_fake,
    lambda g, old, new, old_sizes, new_sizes, *rest: swap(
        g, new, old, new_sizes, old_sizes, *rest
    ),
    lambda old, new, old_sizes, new_sizes, *rest: (old, new, cut(old_sizes), cut(new_sizes), *rest),
    lambda old, new, old_sizes, new_sizes, among, group: (
        old, new, list(old_sizes), list(new_sizes), list(among), group,
    ),
)  # fmt: skip


# ring --------------------------------------------------------------------------------------------


def _ring(x: Tensor, dim: int, sizes: Cut, held: int, shift: int, group: str) -> Tensor:
    n, me = len(sizes), groups.facts[group].rank
    if shift % n == 0:
        return x.clone(memory_format=torch.contiguous_format)
    source = (me - shift) % n
    shape = _resized(x.shape, dim, sizes[(source - held) % n])
    return wire.exchange({(me + shift) % n: [x]}, {source: [shape]}, x, group, "ring")[source][0]


ring, ring_op = paired(
    "ring(Tensor x, int dim, int[] sizes, int held, int shift, str group) -> Tensor",
    _ring,
    lambda x, dim, sizes, held, shift, group: x.new_empty(
        _resized(x.shape, dim, sizes[(groups.facts[group].rank - shift - held) % len(sizes)])
    ),
    lambda g, dim, sizes, held, shift, group: ring(g, dim, sizes, held + shift, -shift, group),
    lambda dim, sizes, *rest: (dim, cut(sizes), *rest),
    lambda dim, sizes, *rest: (dim, list(sizes), *rest),
)
