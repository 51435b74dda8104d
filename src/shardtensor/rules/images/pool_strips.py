"""A pool of the shard itself, while strips of others' rows travel: no copy of the shard is made.

The kernel pools the shard as if there were nothing beside it. What windows at its rims read of
others is pooled of small copies, and takes the place of what the kernel found there. Kept for
backward are the shard, the places of what is largest, and the rims: where a rim tells the place,
those of the shard name none, which torch's kernels pass over (`tests/test_private_torch.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._torch import Function
from ...cache import cached
from ...cuts import table
from ...spec import Spec
from ..flat import move
from ..overlap import Box, _boxed, among_zeros, route
from ..sliding import Reads
from ..strips import Owed, Side, beside, end, ends, grown, returned, sent, shared
from ..windows import Reach, Stencil
from .pool_kernels import How, adjoint, pooled

# of places: parts of a shard in which they are made those of the shard alone
PARTS = 16


class Rim(NamedTuple):
    """Outputs at an end of the shard that read a strip beside it, of these rows, and own ones."""

    below: bool
    rows: int
    outputs: int
    own: int

    def outputs_of(self, y: Tensor, d: int) -> Tensor:
        return end(y, d, self.outputs, self.below)


class Laid(NamedTuple):
    """How a pool runs on this rank's shard, and what lies beside it.

    first: of the pooled dims. starts, whole: where the shard begins in them, and their sizes.
    """

    how: How
    sides: tuple[Side, ...]
    first: int
    starts: tuple[int, ...]
    whole: tuple[int, ...]

    def rims(self) -> list[tuple[int, Side, Rim]]:
        return [(i, side, rim) for i, side in enumerate(self.sides) for rim in side.strips]


@cached
def laid(
    spec: Spec, stencils: tuple[tuple[int, Stencil], ...], reads: Reads, how: How
) -> Laid | None:
    """None, on all ranks, where kernels on shards do not find the rows of every rank's result.

    They do with as many rows of padding on both sides as are read above, where one way of rounding
    makes as many rows of each shard as there are, and ranks read of direct neighbours alone.
    """
    first = len(spec.dims) - len(how.kernel)
    if 0 in spec.shape or any(0 in dim.sizes for dim in spec.dims[:first]):
        return None
    read = {d: reach for d, _, reach in reads}
    found = [_served(spec, d, s, read.get(d), how.by is None) for d, s in stencils]
    # by dim, of which ways of rounding its shards are served, and that of this rank
    if not all(any(map(all, zip(*ways, strict=True))) for ways in product(*(f[0] for f in found))):
        return None
    ceil = not all(f[1][0] for f in found)
    padding, sides = list(how.padding), []
    for (d, s), (_, _, above, below) in zip(stencils, found, strict=True):
        if d not in read:
            continue
        me, last = spec.index[d], len(spec.dims[d].sizes) - 1
        own_above, own_below, up, down, travel = beside(above, below, me)
        padding[d - first] = own_above
        if not travel:
            continue
        rims = []
        for behind, rows, comes in ((False, own_above, me > 0), (True, own_below, me < last)):
            if rows > 0 and comes:
                outputs = -(-rows // s.stride)
                rims.append(Rim(behind, rows, outputs, (outputs - 1) * s.stride + s.extent - rows))
        _, way, _ = route(spec, d, read[d])
        sides.append(
            Side(d, way, way.back(), ends(up, down), own_above, max(0, own_below), tuple(rims))
        )
    here = how._replace(padding=tuple(padding), ceil=ceil)
    return Laid(here, tuple(sides), first, spec.offset[first:], spec.shape[first:])


def _served(
    spec: Spec, d: int, s: Stencil, reach: Reach | None, largest: bool
) -> tuple[set[tuple[bool, ...]], tuple[bool, ...], Any, Any]:
    """(by ways of rounding which shards are served, this rank's; rows read above and below)."""
    if reach is None:
        fits = tuple(
            [
                s._replace(ceil=c).outputs(spec.shape[d]) == s.outputs(spec.shape[d])
                for c in (False, True)
            ]
        )
        return {fits}, fits, None, None
    dim, windows = spec.dims[d], table(reach.windows)
    rows, outputs = np.diff(dim.edges), np.diff(reach.dim.edges)
    above, below = dim.edges[:-1] - windows[:, 0], windows[:, 1] - dim.edges[1:]
    # torch pads half of a kernel's rows at most
    good = (rows > 0) & (outputs > 0) & (above >= 0) & (2 * above <= s.size)
    # torch's means of volumes take no shard that is smaller than a kernel
    good &= rows + 2 * above * largest >= s.extent
    # rims: as many outputs as there are, which read own rows beside the strip, and not the other
    for beyond, there in ((above, slice(1, None)), (below, slice(0, -1))):
        rim = -(-beyond // s.stride)
        own = (rim - 1) * s.stride + s.extent - beyond
        read = beyond > 0
        good[there] &= (~read | ((rim <= outputs) & (own > 0) & (own <= rows)))[there]
    good[1:] &= above[1:] <= rows[:-1]
    good[:-1] &= below[:-1] <= rows[1:]
    made = [s._replace(before=above, after=None, ceil=c).outputs(rows) for c in (False, True)]
    ways = np.stack([good & (m == outputs) for m in made], 1)
    every = {tuple(row) for row in np.unique(ways, axis=0).tolist()}
    return every, tuple(ways[spec.index[d]].tolist()), above, below


def pool_strips(
    x: Tensor, laid: Laid, fill: float, places: bool, again: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """(what windows hold at most, or their means; where asked for the places in the whole).

    again: the same of a copy with all rows, differentiable any number of times.
    """
    out, index = _Pool.apply(x, laid, fill, places, again)
    return out, index


class _Pool(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, laid: Laid, fill: float, places: bool, again: Any
    ) -> tuple[Tensor, Tensor | None]:
        ctx.materialize_grads = False
        n = len(laid.how.kernel)
        (out, index), came = sent(x, laid.sides, lambda: pooled(x, laid.how), fill)
        if places:
            move(index, x.shape[-n:], laid.starts, laid.whole)
        strips = iter([strip for of in came for strip in of])
        rims: list[tuple[Tensor, Tensor | None]] = []
        for i, side, rim in laid.rims():
            window = _window(x, next(strips), laid, i, rim, came, fill)
            y, at = pooled(window, _of_rim(laid, i))
            target = rim.outputs_of(out, side.d)
            target.copy_(_cropped(y, target))
            if places:
                named = _cropped(at, target).clone()
                move(named, window.shape[-n:], _starts(laid, x, i, rim), laid.whole)
                rim.outputs_of(index, side.d).copy_(named)
            elif at is not None:
                rim.outputs_of(index, side.d).fill_(-1)
            for (j, other, before), (_, earlier) in zip(laid.rims(), rims, strict=False):
                # what two of them make is of the later
                if j < i and earlier is not None:
                    same = _cropped(earlier, before.outputs_of(out, other.d))
                    rim.outputs_of(same, side.d).fill_(-1)
            rims.append((window, at))
        ctx.save_for_backward(x, index, *chain.from_iterable(rims))
        ctx.facts = laid, places, again
        if not places:
            return out, None
        ctx.mark_non_differentiable(index)
        return out, index

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any = None) -> Any:
        """The strips' gradients travel while those of the shard are found."""
        if g is None:
            return (None,) * 5
        x, index, *rims = ctx.saved_tensors
        laid, places, again = ctx.facts
        if torch.is_grad_enabled():
            rows = x.view_as(x)
            (found,) = torch.autograd.grad(again(rows), rows, g, create_graph=True)
            return found, None, None, None, None
        sides = laid.sides
        outward: list[list[Tensor]] = [[] for _ in sides]
        owed: list[Owed] = []
        for (i, side, rim), window, at in zip(laid.rims(), rims[::2], rims[1::2], strict=True):
            back = _of_window(rim.outputs_of(g, side.d), window, laid, i, at)
            lengths = (rim.own, rim.rows) if rim.below else (rim.rows, rim.own)
            parts = back.split(lengths, side.d)
            outward[i].append(parts[rim.below].contiguous())
            if at is not None:
                # those of means are found with the shard's
                mine = parts[not rim.below]
                owed += shared(sides[: i + 1], [(rim.own, rim.below)], [mine], outward)
        in_parts = places and index is not None
        gx, more = returned(
            x, sides, outward,
            lambda: _in_parts(g, x, index, laid) if in_parts else adjoint(g, x, laid.how, index),
        )  # fmt: skip
        for d, rows, below, back in owed + more:
            end(gx, d, rows, below).add_(back)
        return gx, None, None, None, None


def _bare(side: Side) -> int:
    """The rows of fill above a shard that no other is before."""
    return 0 if any(not s.below for s in side.strips) else side.above


def _window(
    x: Tensor, strip: Tensor, laid: Laid, i: int, rim: Rim, came: Sequence[list[Tensor]],
    fill: float,
) -> Tensor:  # fmt: skip
    """What outputs at a rim of side i read; the kernel itself pads before the first rows."""
    sides, d = laid.sides[:i], laid.sides[i].d
    own = grown(x, d, rim.own, rim.below, sides, came, fill)
    return _boxed(torch.cat([own, strip] if rim.below else [strip, own], d), _filled(sides, strip))


def _filled(sides: Sequence[Side], like: Tensor) -> Box:
    """Of what has these sides around it: without fill before the first rows."""
    bare = [(side.d, _bare(side)) for side in sides]
    return tuple([(d, rows, like.shape[d] - rows) for d, rows in bare if rows])


def _of_rim(laid: Laid, i: int) -> How:
    """What the kernel gets for a window at a rim of side i."""
    padding = list(laid.how.padding)
    for j, side in enumerate(laid.sides[: i + 1]):
        padding[side.d - laid.first] = _bare(side) if j < i else 0
    return laid.how._replace(padding=tuple(padding))


def _starts(laid: Laid, x: Tensor, i: int, rim: Rim) -> list[int]:
    """Where a window at a rim of side i begins in the whole."""
    starts = list(laid.starts)
    for side in laid.sides[:i]:
        starts[side.d - laid.first] -= side.above - _bare(side)
    d = laid.sides[i].d
    starts[d - laid.first] += x.shape[d] - rim.own if rim.below else -rim.rows
    return starts


def _cropped(y: Tensor, like: Tensor) -> Tensor:
    """The first rows of y, as many as another has: of padding on both sides it may have more."""
    for d, rows in enumerate(like.shape):
        y = y if y.shape[d] == rows else y.narrow(d, 0, rows)
    return y


def _of_window(g: Tensor, window: Tensor, laid: Laid, i: int, at: Tensor | None) -> Tensor:
    """The gradient of what a rim of side i reads, with the fill that the kernel did without."""
    how, sides = _of_rim(laid, i), laid.sides[:i]
    made = list(g.shape)
    for side in sides:
        e = side.d - laid.first
        s = Stencil(how.kernel[e], how.stride[e], how.padding[e], how.dilation[e], ceil=how.ceil)
        made[side.d] = s.outputs(window.shape[side.d])
    g = among_zeros(g, tuple([(s.d, 0, g.shape[s.d]) for s in sides]), made) if sides else g
    found = adjoint(g.contiguous(), window, how, at)
    whole = [n + sum([_bare(s) for s in sides if s.d == e]) for e, n in enumerate(found.shape)]
    box = tuple([(s.d, _bare(s), found.shape[s.d]) for s in sides if _bare(s)])
    return among_zeros(found, box, whole) if box else found


def _in_parts(g: Tensor, x: Tensor, index: Tensor, laid: Laid) -> Tensor:
    """The gradient of the shard by places in the whole, made those in the shard a few at a time."""
    n, gx = len(laid.how.kernel), torch.empty_like(x)
    d = max(range(laid.first), key=x.size)
    step = -(-x.shape[d] // PARTS)
    for part in zip(*(t.split(step, d) for t in (g, x, index, gx)), strict=True):
        at = move(part[2].clone(), laid.whole, [-a for a in laid.starts], x.shape[-n:])
        for _, side, rim in laid.rims():
            rim.outputs_of(at, side.d).fill_(-1)
        part[3].copy_(adjoint(part[0], part[1], laid.how, at))
    return gx
