"""What travels around a ring: keys with their values, and what was found for them.

Large ones go in two exchanges: keys and values are one vector, which is sent on as it came, and its
memory goes with it. Small ones go in one. Of very small ones several places get each other's first,
with tokens first, so that what came is in order, and pass all of them on together.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .. import comm
from ..comm import wire
from ..comm.pack import joined, numel_but, packed
from .blocks import wide
from .call import Call, Span

# rows of queries, of all their heads, from which on heads take turns; 8 times as many on GPUs, that
# are through with so few before the host has started the next: 60 us on an H100 with 2^13 keys
ROWS = 2**14
# elements of keys and values from which on they are not copied to be sent
LARGE = 2**18


class Held(NamedTuple):
    """The keys and values that a rank has at a step, and the vector that they are."""

    keys: Tensor
    values: Tensor
    flat: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, steps: int) -> Held:
        """Before the first step; nothing is copied where they do not travel."""
        return cls(k, v, joined([k, v], k) if steps else k)


class Shapes(NamedTuple):
    """Of a block of keys and its values, but for the number of tokens."""

    batch: int
    heads: int
    widths: tuple[int, int]

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Shapes:
        return cls(k.shape[0], k.shape[1], (k.shape[3], v.shape[3]))

    def numel(self, tokens: int) -> int:
        """The elements of both."""
        return self.batch * self.heads * tokens * sum(self.widths)

    def both(self, tokens: int) -> list[list[int]]:
        """Those of both, as one tensor where they are alike."""
        shapes = [[self.batch, self.heads, tokens, width] for width in self.widths]
        return shapes if shapes[0] != shapes[1] else [[2, *shapes[0]]]

    def held(self, flat: Tensor) -> Held:
        """Keys and values that came as a vector."""
        tokens = flat.numel() // max(1, self.numel(1))
        first, second = ([self.batch, self.heads, tokens, width] for width in self.widths)
        n = prod(first)
        return Held(flat[:n].view(first), flat[n:].view(second), flat)


class _Step(NamedTuple):
    """Whom keys go to and come from with a step, then what the step before found; None: nobody.

    coming: the shapes of keys that come. owners: of the block that was found for. back: the shapes
    of what others found. large: whether they go in two exchanges.
    """

    to: int | None
    source: int | None
    coming: list[list[int]]
    owners: list[int]
    back: dict[int, list[list[int]]]
    large: bool


def _step(call: Call, step: int, returns: bool, like: Shapes) -> _Step:
    lay, me = call.laid, call.me
    to = source = None
    coming, owners = list[list[int]](), list[int]()
    back = dict[int, list[list[int]]]()
    if step < call.steps:
        arrives = call.held(me, step + 1)
        if step < lay.hops[call.held(me, step)]:
            to = call.rank(me + 1)
        if step < lay.hops[arrives]:
            source, coming = call.rank(me - 1), [[like.numel(lay.held[arrives])]]
    if returns:
        of, finder = call.held(me, step - 1), (me + step - 1) % call.n
        if lay.sees(me, of):
            owners = call.owners(of)
        if lay.sees(finder, me):
            sizes, mine = call.owned(me)
            back = dict.fromkeys(call.owners(finder), like.both(sizes[mine]))
    # alike on all ranks: those of a team may have different numbers of heads
    large = call.team == 1 and like.numel(max(lay.held)) >= LARGE
    return _Step(to, source, coming, owners, back, large)


def start(
    call: Call, step: int, held: Held, found: list[Tensor], like: Shapes
) -> tuple[Callable[[], Held], Callable[[], list[Tensor]]]:
    """Start what travels while a step computes: its keys, and what the last one `found`.

    The first of what it returns gives the keys and values of the next step, the second what another
    rank found for this one's. `found` is empty afterwards.
    """
    travels, returns = step < call.steps, bool(found)
    if not (travels or returns):
        return (lambda: held), list
    key = step, returns, like
    plan: _Step | None = call.kept.get(key)
    if plan is None:
        plan = call.kept[key] = _step(call, step, returns, like)
    to, source, coming, owners, back, large = plan
    flat, both = held.flat, travels and returns and not large
    sends, shapes = dict[int, list[Tensor]](), dict[int, list[list[int]]]()
    first = second = _nothing
    if to is not None:
        # beside what goes home of one form with it, so that one copy joins them
        sends[to] = [held.keys, held.values] if both else [flat]
    if source is not None:
        shapes[source] = coming
    if travels and not both:
        first = _exchange(call, flat, sends, shapes)
        sends, shapes = {}, {}
    if returns:
        # to and from other ranks
        if owners:
            sends.update(_apart(call, call.held(call.me, step - 1), owners, found))
        shapes.update(back)
        found.clear()
        second = _exchange(call, flat, sends, shapes)
        first = second if both else first

    def arrived() -> Held:
        # also where nothing comes: what is sent is lost with a message that nobody waits for
        came = first()
        return like.held(flat.new_empty(0) if source is None else came[source][0])

    def returned() -> list[Tensor]:
        came = second()
        return _summed([came[r] for r in back])

    return arrived, returned


def _nothing() -> dict[int, list[Tensor]]:
    return {}


def _exchange(
    call: Call, like: Tensor, sends: dict[int, list[Tensor]], shapes: dict[int, list[list[int]]]
) -> Callable[[], dict[int, list[Tensor]]]:
    wait = wire.start_exchange(sends, shapes, like, call.group, "ring")
    # what was copied to be sent goes
    sends.clear()
    came: list[dict[int, list[Tensor]]] = []

    def arrived() -> dict[int, list[Tensor]]:
        if not came:
            came.append(wait())
        return came[0]

    return arrived


def in_turns(call: Call, q: Tensor, k: Tensor, mask_grad: bool) -> list[tuple[Span, Span]]:
    """(heads of queries, heads of keys) that go around the ring in turns, alike on all ranks.

    What is in flight is a block of some heads, not of all. Each turn has ROWS rows of queries at
    least, so that kernels and messages have enough to do; dropout draws for all heads at once.
    """
    heads, groups = q.shape[1], k.shape[1]
    if call.team > 1 or call.drop or mask_grad or not (heads and groups and q.shape[0]):
        return [((0, heads), (0, groups))]
    times = heads // groups
    least = ROWS if q.device.type == "cpu" else 8 * ROWS
    each = min(groups, max(1, -(-least // max(1, q.shape[0] * times * call.rows))))
    # as even as can be
    each = -(-groups // -(-groups // each))
    ends = [(a, min(a + each, groups)) for a in range(0, groups, each)]
    return [((a * times, b * times), (a, b)) for a, b in ends]


def shared(call: Call, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of this rank's block, which is more than its own if places share one."""
    if call.together == 1:
        return k, v
    sizes, windows = call.shared
    keys, values = (
        x.permute(1, 2, 0, 3)
        for y in _tokens_first(k, v)
        for x in comm.window(y, 0, sizes, windows, call.group).unbind(1)
    )
    return keys, values


def own_part(call: Call, found: list[Tensor]) -> list[Tensor]:
    """Of what was found for keys and values of this rank's block what is its own."""
    if call.together == 1:
        return found
    sizes, mine = call.owned(call.me)
    return [x.narrow(2, sizes.offsets[mine], sizes[mine]) for x in found]


def _apart(
    call: Call, block: int, owners: list[int], found: list[Tensor]
) -> dict[int, list[Tensor]]:
    """What was found for a block's keys and values, by whom they are."""
    if call.together == 1:
        return {r: list(found) for r in owners}
    (sizes, mine), sends = call.owned(block), dict[int, list[Tensor]]()
    if found[0].shape == found[1].shape:
        # one kernel for each owner, which joins keys and values and takes its rows
        others = [(sizes.offsets[i], n) for i, n in enumerate(sizes) if i != mine]
        for r, (first, n) in zip(owners, others, strict=True):
            sends[r] = [torch.cat([x.narrow(2, first, n) for x in found]).reshape(-1)]
        return sends
    tokens = [n for i, n in enumerate(sizes) if i != mine]
    for x in found:
        rest = numel_but(x.shape, 2)
        parts = packed(x, 2, sizes, mine).split([rest * n for n in tokens])
        for r, part in zip(owners, parts, strict=True):
            sends.setdefault(r, []).append(part)
    return sends


def _summed(parts: list[list[Tensor]]) -> list[Tensor]:
    """What several ranks found for the same, each in one tensor or in two, added up."""
    if len(parts) < 2:
        return parts[0] if parts else []
    dtype = wide(parts[0][0].dtype)
    if len(parts[0]) == 1:
        # as it came, one after the other
        first = parts[0][0]
        every = joined([x for (x,) in parts], first).view(len(parts), *first.shape)
        return [every.sum(0, dtype=dtype)]
    return [torch.stack(xs).sum(0, dtype=dtype) for xs in zip(*parts, strict=True)]


def _tokens_first(k: Tensor, v: Tensor) -> list[Tensor]:
    """(tokens, 1 or 2, batch, heads, width): both in one tensor if they are alike."""
    both = [x.permute(2, 0, 1, 3) for x in (k, v)]
    return [torch.stack(both, 1)] if k.shape == v.shape else [x.unsqueeze(1) for x in both]
