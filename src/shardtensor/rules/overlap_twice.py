"""A stencil along two dims whose strips travel: the shard is not copied along either.

`overlapped` serves one dim; along another one its input would be a copy with the rows of others,
which what saves its input keeps for backward. Here strips come along both, those of the second with
what came along the first at their ends: the corners. The interior is computed of a view while the
second travel, the rims of small copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch.autograd import apply
from ..comm.exchanges import Exchange
from ..comm.formats import empty
from ..spec import Spec
from .overlap import (
    Box,
    Route,
    _around,
    _Begin,
    _boxed,
    _Cut,
    _End,
    _interior,
    _Join,
    _own,
    _ranges,
    _tie,
    resized,
    route,
)  # fmt: skip
from .windows import Reach, Stencil


class _Along(NamedTuple):
    """A stencil along one of two dims: the exchange, and the own rows that outputs read.

    sent: to others. own: all. parts: by the outputs before the interior, in it and after it. inner:
    whether there is any. ahead, behind: whether there are outputs before and after.
    """

    d: int
    plan: Exchange
    way: Route
    me: int
    sent: list[tuple[int, int]]
    own: tuple[int, int]
    parts: list[tuple[int, int]]
    inner: bool
    ahead: bool
    behind: bool

    @staticmethod
    def of(spec: Spec, d: int, stencil: Stencil, reach: Reach) -> _Along:
        plan, way, sent = route(spec, d, reach)
        me = spec.index[d]
        own, ends = _own(plan, me), reach.dim.spans[me]
        first, last = _interior(spec, d, reach, stencil)
        parts = _ranges(own, spec.offset[d], ends, first, last, stencil)
        return _Along(d, plan, way, me, sent, (own.start, own.stop), parts, first < last,
                      first > ends[0], last < ends[1])  # fmt: skip

    def box(self, rows: tuple[int, int]) -> tuple[int, int, int]:
        return self.d, rows[0], rows[1] - rows[0]

    def start(self, like: Tensor, tie: Tensor, parts: Sequence[Tensor]) -> Tensor:
        token: Tensor = apply(_Begin, self.way, like, tie, *parts)
        return token

    def around(self, came: list[Tensor], like: Tensor, fill: float) -> _Around:
        before, after = _around(self.plan, self.me, came, like, self.d, fill)
        return _Around(self.d, before, after)


class _Around(NamedTuple):
    """What lies before and after the own rows along a dim."""

    d: int
    before: list[Tensor]
    after: list[Tensor]

    def joined(self, x: Tensor, ahead: bool = True, behind: bool = True) -> Tensor:
        rows = [
            *self.before[: ahead * len(self.before)],
            x,
            *self.after[: behind * len(self.after)],
        ]
        return torch.cat(rows, self.d) if len(rows) > 1 else x

    def within(self, box: tuple[int, int, int]) -> _Around:
        """Of some rows of another dim."""
        return self._replace(
            before=[x.narrow(*box) for x in self.before], after=[x.narrow(*box) for x in self.after]
        )


def overlapped_twice(
    x: Tensor,
    spec: Spec,
    reads: Sequence[tuple[int, Stencil, Reach]],
    op: Callable[[Tensor], Tensor],
    fill: float,
) -> Tensor:
    """op of this rank's window along two dims, in both of which ranks read others' rows.

    The strips of the second, which have those of the first at their ends, travel while the interior
    of both is computed.
    """
    one, two = (_Along.of(spec, *read) for read in reads)
    inner = one.inner and two.inner
    boxes: list[Box] = [(one.box((a, b)),) for a, b in one.sent]
    boxes += [(one.box(one.own), two.box(rows)) for rows in two.sent]
    if inner:
        boxes += [(one.box(rows), two.box(two.parts[1])) for rows in one.parts]
        boxes += [(one.box(one.own), two.box(rows)) for rows in (two.parts[0], two.parts[2])]
    else:
        boxes.append((one.box(one.own), two.box(two.own)))
    pieces = list(apply(_Cut, x, tuple(boxes)))
    given, pieces = pieces[: len(one.sent)], pieces[len(one.sent) :]
    token, *rows = apply(_End, one.way, one.start(x, x, given))
    first = one.around(rows, x, fill)
    given, pieces = pieces[: len(two.sent)], pieces[len(two.sent) :]
    strips = [first.within(two.box(of)).joined(p) for of, p in zip(two.sent, given, strict=True)]
    none = (two.d, 0, 0)
    like = first.within(none).joined(_boxed(x, (one.box(one.own), none))).detach()
    coming = two.start(like, token, strips)
    if not inner:
        came, *rows = apply(_End, two.way, coming)
        whole = first.within(two.box(two.own)).joined(pieces[0])
        return apply(_Join, two.d, came, op(two.around(rows, like, fill).joined(whole)))
    top, middle, bottom, left, right = pieces
    beside = first.within(two.box(two.parts[1]))
    column = [op(middle)]
    if one.ahead:
        column.insert(0, op(beside.joined(top, behind=False)))
    if one.behind:
        column.append(op(beside.joined(bottom, ahead=False)))
    came, *rows = apply(_End, two.way, coming)
    second = two.around(rows, like, fill)
    ends: list[list[Tensor]] = [[], []]
    for i, (asked, piece) in enumerate(((two.ahead, left), (two.behind, right))):
        if asked:
            rim = first.within(two.box(two.parts[2 * i])).joined(piece)
            ends[i] = [op(second.joined(rim, ahead=not i, behind=bool(i)))]
    return _grid(one.d, two.d, came, ends[0], column, ends[1])


def _grid(
    d: int, e: int, tie: Tensor, left: list[Tensor], column: list[Tensor], right: list[Tensor]
) -> Tensor:
    """A column of parts along d, between parts along e which are as high as it, in one tensor."""
    boxes: list[Box] = []
    rows, at = 0, 0
    high = sum([p.shape[d] for p in column])
    for part in left:
        boxes.append(((e, 0, part.shape[e]),))
        at = part.shape[e]
    for part in column:
        boxes.append(((d, rows, part.shape[d]), (e, at, part.shape[e])))
        rows += part.shape[d]
    at += column[0].shape[e]
    for part in right:
        boxes.append(((e, at, part.shape[e]),))
        at += part.shape[e]
    shape = resized(resized(column[0].shape, d, high), e, at)
    return apply(_Grid, tuple(boxes), shape, tie, *left, *column, *right)


class _Grid(torch.autograd.Function):
    """Boxes of a tensor put together, and a tie as that of rows."""

    @staticmethod
    def forward(
        ctx: Any, boxes: tuple[Box, ...], shape: list[int], tie: Tensor, *parts: Tensor
    ) -> Tensor:
        ctx.boxes, ctx.tie = boxes, tie
        ctx.save_for_backward(tie.new_empty(0))
        out = empty(parts[0], shape)
        for box, part in zip(boxes, parts, strict=True):
            _boxed(out, box).copy_(part)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, None, _tie(ctx, g), *[_boxed(g, box) for box in ctx.boxes]
