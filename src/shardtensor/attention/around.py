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


class _Way(NamedTuple):
    """What goes to whom, and the shapes of what comes from whom."""

    sends: dict[int, list[Tensor]]
    shapes: dict[int, list[list[int]]]


def start(
    call: Call, step: int, held: Held, found: list[Tensor], like: Shapes
) -> tuple[Callable[[], Held], Callable[[], list[Tensor]]]:
    """Start what travels while a step computes: its keys, and what the last one `found`.

    The first of what it returns gives the keys and values of the next step, the second what another
    rank found for this one's. `found` is empty afterwards.
    """
    lay, me = call.laid, call.me
    travels, returns = step < call.steps, bool(found)
    keys, home = _Way({}, {}), _Way({}, {})
    if travels:
        coming = call.held(me, step + 1)
        if step < lay.hops[call.held(me, step)]:
            keys.sends[call.rank(me + 1)] = [held.flat]
        if step < lay.hops[coming]:
            keys.shapes[call.rank(me - 1)] = [[like.numel(lay.held[coming])]]
    if returns:
        of, finder = call.held(me, step - 1), (me + step - 1) % call.n
        if lay.sees(me, of):
            home.sends.update(_apart(call, of, found))
        if lay.sees(finder, me):
            sizes, mine = call.owned(me)
            home.shapes.update(dict.fromkeys(call.owners(finder), like.both(sizes[mine])))
        found.clear()
    empty = held.flat.new_empty(0)
    # alike on all ranks: those of a team may have different numbers of heads
    large = call.team == 1 and like.numel(max(lay.held)) >= LARGE
    if travels and returns and not large:
        # to and from other ranks; of one form, so that one copy joins them
        for r in keys.sends:
            keys.sends[r] = [held.keys, held.values]
        first = second = _exchange(call, empty, keys, home)
    else:
        first = _exchange(call, empty, keys) if travels else dict
        second = _exchange(call, empty, home) if returns else dict
    of_keys, of_home = list(keys.shapes), list(home.shapes)

    def arrived() -> Held:
        came = first()
        return like.held(came[of_keys[0]][0] if of_keys else empty)

    def returned() -> list[Tensor]:
        came = second()
        return _summed([came[r] for r in of_home])

    return arrived, returned


def _exchange(call: Call, like: Tensor, *ways: _Way) -> Callable[[], dict[int, list[Tensor]]]:
    sends = {r: parts for way in ways for r, parts in way.sends.items()}
    shapes = {r: parts for way in ways for r, parts in way.shapes.items()}
    wait = wire.start_exchange(sends, shapes, like, call.group, "ring")
    for way in ways:
        # what was copied to be sent goes
        way.sends.clear()
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
    rows = max(sum(n for _, n in spans) for spans in call.laid.queries)
    least = ROWS if q.device.type == "cpu" else 8 * ROWS
    each = min(groups, max(1, -(-least // max(1, q.shape[0] * times * rows))))
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


def _apart(call: Call, block: int, found: list[Tensor]) -> dict[int, list[Tensor]]:
    """What was found for a block's keys and values, by whom they are."""
    owners = call.owners(block)
    if call.together == 1:
        return {r: list(found) for r in owners}
    (sizes, mine), sends = call.owned(block), dict[int, list[Tensor]]()
    tokens = [n for i, n in enumerate(sizes) if i != mine]
    both = [torch.cat(found)] if found[0].shape == found[1].shape else found
    for x in both:
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
