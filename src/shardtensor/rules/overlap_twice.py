"""A stencil along two dims whose strips travel: the shard is not copied along either.

`overlapped` serves one dim; along another one its input would be a copy with the rows of others,
which what saves its input keeps for backward. Here strips come along both, those of the second with
what came along the first at their ends: the corners. The interior is computed of a view while the
second travel, the rims of small copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._torch import Function
from ..comm.formats import empty
from ..spec import Spec
from .overlap import Along, Box, _boxed, _Cut, _Join, _tie, resized
from .windows import Reach, Stencil


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
    one, two = (Along.of(spec, *read) for read in reads)
    inner = one.inner and two.inner
    boxes: list[Box] = [(one.box((a, b)),) for a, b in one.sent]
    boxes += [(one.box(one.own), two.box(rows)) for rows in two.sent]
    if inner:
        boxes += [(one.box(rows), two.box(two.parts[1])) for rows in one.parts]
        boxes += [(one.box(one.own), two.box(rows)) for rows in (two.parts[0], two.parts[2])]
    else:
        boxes.append((one.box(one.own), two.box(two.own)))
    pieces = list(_Cut.apply(x, tuple(boxes)))
    given, pieces = pieces[: len(one.sent)], pieces[len(one.sent) :]
    token, first = one.arrived(one.start(x, x, given), x, fill)
    given, pieces = pieces[: len(two.sent)], pieces[len(two.sent) :]
    strips = [first.within(two.box(of)).joined(p) for of, p in zip(two.sent, given, strict=True)]
    none = (two.d, 0, 0)
    like = first.within(none).joined(_boxed(x, (one.box(one.own), none))).detach()
    coming = two.start(like, token, strips)
    if not inner:
        came, second = two.arrived(coming, like, fill)
        whole = first.within(two.box(two.own)).joined(pieces[0])
        return _Join.apply(two.d, came, op(second.joined(whole)))
    top, middle, bottom, left, right = pieces
    beside = first.within(two.box(two.parts[1]))
    column = one.parted(op, beside, top, op(middle), bottom)
    came, second = two.arrived(coming, like, fill)
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
    return _Grid.apply(tuple(boxes), shape, tie, *left, *column, *right)


class _Grid(Function):
    """Boxes of a tensor put together, and a tie as that of rows."""

    @staticmethod
    def forward(
        ctx: Any, boxes: tuple[Box, ...], shape: list[int], tie: Tensor, *parts: Tensor
    ) -> Tensor:
        ctx.materialize_grads = False
        ctx.boxes, ctx.tie = boxes, tie
        ctx.save_for_backward(tie.new_empty(0))
        out = empty(parts[0], shape)
        for box, part in zip(boxes, parts, strict=True):
            _boxed(out, box).copy_(part)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, *[None] * len(ctx.boxes)
        return None, None, _tie(ctx, g), *[_boxed(g, box) for box in ctx.boxes]
