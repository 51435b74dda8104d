"""A stencil whose rows from other ranks travel while the rows that need none are computed.

Forward: send rim rows, compute the outputs that read own rows only (of a view, which kernels that
take dense images only, as cuDNN's and oneDNN's, copy: as many bytes as a wider buffer with all rows
would take), receive, compute the few others. Backward runs in the reverse order by itself: the
rim's gradient leaves before the interior's is computed and arrives after. Each of `_Begin` and
`_End` is the adjoint of the other, so this can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _torch, comm
from .._torch import Function
from ..cache import cached
from ..comm import wire
from ..comm.exchanges import FILL, Exchange, exchange
from ..comm.formats import empty, memory_format
from ..comm.parcels import Parcels, of_rows
from ..spec import Spec
from .windows import Reach, Stencil, fetch

# elements of a shard below which one more kernel launch costs more than a copy of the input
WORTH = 2**18


class Route(NamedTuple):
    """One exchange of rows: (rank, rows along dim) of what this one sends and gets."""

    dim: int
    sends: tuple[tuple[int, tuple[int, ...]], ...]
    gets: tuple[tuple[int, tuple[int, ...]], ...]
    group: str

    def back(self) -> Route:
        """The same rows, the other way."""
        return self._replace(sends=self.gets, gets=self.sends)


def route(spec: Spec, d: int, reach: Reach) -> tuple[Exchange, Route, list[tuple[int, int]]]:
    """(who needs what, the exchange, the ranges of local rows that are sent, rank by rank)."""
    plan = exchange(spec.dims[d].sizes, reach.windows, False, spec.index[d])
    sends = tuple([(r, tuple([n for _, n in to])) for r, to in plan.sends.items()])
    way = Route(d, sends, tuple(plan.gets.items()), comm.along(spec, d))
    return plan, way, [(a, a + n) for to in plan.sends.values() for a, n in to]


def pays(spec: Spec) -> bool:
    """Whether shards are large enough; alike on all ranks."""
    if spec.alone or spec.shard_numel < WORTH:
        return False
    return not (_torch.is_tracing() or _torch.transforming())


class Along(NamedTuple):
    """A stencil along one dim: the exchange, and the own rows that outputs read.

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
    def of(spec: Spec, d: int, stencil: Stencil, reach: Reach) -> Along:
        plan, way, sent = route(spec, d, reach)
        me = spec.index[d]
        own, ends = _own(plan, me), reach.dim.spans[me]
        first, last = _interior(spec, d, reach, stencil)
        parts = _ranges(own, spec.offset[d], ends, first, last, stencil)
        return Along(d, plan, way, me, sent, (own.start, own.stop), parts, first < last,
                     first > ends[0], last < ends[1])  # fmt: skip

    def box(self, rows: tuple[int, int]) -> tuple[int, int, int]:
        return self.d, rows[0], rows[1] - rows[0]

    def start(self, like: Tensor, tie: Tensor, parts: Sequence[Tensor]) -> Tensor:
        token: Tensor = _Begin.apply(self.way, like, tie, *parts)
        return token

    def arrived(self, token: Tensor, like: Tensor, fill: float) -> tuple[Tensor, Around]:
        """(a tie to the exchange, what came)."""
        tie, *rows = _End.apply(self.way, token)
        return tie, Around(self.d, *_around(self.plan, self.me, rows, like, self.d, fill))

    def parted(
        self, op: Callable[[Tensor], Tensor], around: Around, top: Tensor, middle: Tensor,
        bottom: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """The outputs before the interior, those in it, which are there, and those after it."""
        found = [middle]
        if self.ahead:
            found.insert(0, op(around.joined(top, behind=False)))
        if self.behind:
            found.append(op(around.joined(bottom, ahead=False)))
        return found


class Around(NamedTuple):
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

    def within(self, box: tuple[int, int, int]) -> Around:
        """Of some rows of another dim."""
        return self._replace(
            before=[x.narrow(*box) for x in self.before], after=[x.narrow(*box) for x in self.after]
        )


def overlapped(
    x: Tensor,
    d: int,
    spec: Spec,
    reach: Reach,
    stencil: Stencil,
    op: Callable[[Tensor], Tensor],
    fill: float,
) -> Tensor:
    """op of this rank's window along dim d, where op makes its output rows as the stencil says."""
    if reach.inside:
        return op(fetch(x, d, spec, reach, fill))
    along = Along.of(spec, d, stencil, reach)
    pieces = _Cut.apply(x, tuple([(along.box(rows),) for rows in (*along.sent, *along.parts)]))
    given, (top, inner, bottom) = pieces[: len(along.sent)], pieces[len(along.sent) :]
    token = along.start(x, x, given)
    middle = op(inner) if along.inner else None
    came, around = along.arrived(token, x, fill)
    if middle is None:
        return _Join.apply(d, came, op(around.joined(top)))
    return _Join.apply(d, came, *along.parted(op, around, top, middle, bottom))


def _ranges(
    own: range, offset: int, ends: tuple[int, int], first: int, last: int, stencil: Stencil
) -> list[tuple[int, int]]:
    """Local rows that the outputs before, in and after the interior read of this rank's own."""
    if first == last:
        return [(own.start, own.stop), (0, 0), (0, 0)]
    stride, before, extent = stencil.stride, stencil.before, stencil.extent

    def row(output: int) -> int:
        return output * stride - before - offset

    return [
        (own.start, max(own.start, row(first - 1) + extent)) if first > ends[0] else (0, 0),
        (row(first), row(last - 1) + extent),
        (min(own.stop, row(last)), own.stop) if last < ends[1] else (0, 0),
    ]


def _interior(spec: Spec, d: int, reach: Reach, stencil: Stencil) -> tuple[int, int]:
    """The output rows [first, last) of this rank that read own rows only."""
    me, start = spec.index[d], spec.offset[d]
    stop = start + spec.dims[d].sizes[me]
    a, b = reach.dim.spans[me]
    first = max(a, -(-(start + stencil.before) // stencil.stride))
    last = min(b, (stop - stencil.extent + stencil.before) // stencil.stride + 1)
    return (first, last) if first < last else (a, a)


def _own(plan: Exchange, me: int) -> range:
    """The local rows in this rank's window."""
    found = [range(p.start, p.start + p.length) for p in plan.pieces if p.source == me]
    return found[0] if found else range(0)


def _around(
    plan: Exchange, me: int, rows: list[Tensor], like: Tensor, d: int, fill: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows before and after this rank's own in its window."""
    by_rank = sorted(
        (i for i, p in enumerate(plan.pieces) if p.source not in (me, FILL)),
        key=lambda i: (plan.pieces[i].source, i),
    )
    got = dict(zip(by_rank, rows, strict=True))
    own = next((i for i, p in enumerate(plan.pieces) if p.source == me), len(plan.pieces))
    before: list[Tensor] = []
    after: list[Tensor] = []
    form = memory_format(like)
    for i, p in enumerate(plan.pieces):
        if p.source == me:
            continue
        if p.source == FILL:
            shape = list(like.shape)
            shape[d] = p.length
            row = like.new_full(shape, fill)
        else:
            row = got[i]
        # torch.cat keeps a format that all have
        row = row.contiguous(memory_format=form)
        (before if i < own else after).append(row)
    return before, after


# (dim, first row, rows) of each dim in which a box is not all of a tensor
Box = tuple[tuple[int, int, int], ...]


def _boxed(x: Tensor, box: Box) -> Tensor:
    for d, first, rows in box:
        x = x.narrow(d, first, rows)
    return x


def among_zeros(x: Tensor, box: Box, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape: x in the box, zeros elsewhere."""
    pads = [0, 0] * x.ndim
    for d, first, rows in box:
        at = 2 * (x.ndim - 1 - d)
        pads[at : at + 2] = first, shape[d] - first - rows
    return F.pad(x, pads)


class _Cut(Function):
    """Boxes of a tensor, which may overlap; the adjoint adds them up in one buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, boxes: tuple[Box, ...]) -> tuple[Tensor, ...]:
        ctx.materialize_grads = False
        ctx.shape, ctx.boxes, ctx.form = x.shape, boxes, memory_format(x)
        return tuple(_boxed(x, box) for box in boxes)

    @staticmethod
    def backward(ctx: Any, *found: Tensor | None) -> Any:
        boxes = [box for box, g in zip(ctx.boxes, found, strict=True) if g is not None]
        grads = [g for g in found if g is not None]
        if not grads:
            return None, None
        if torch.is_grad_enabled():
            total: Any = 0
            for box, g in zip(boxes, grads, strict=True):
                total = total + among_zeros(g, box, ctx.shape)
            return total, None
        out = rest = empty(grads[0], ctx.shape, ctx.form)
        # the interior, which is nearly all of it, is written once, not added to zeros
        most = max(range(len(grads)), key=lambda i: grads[i].numel())
        for d, first, rows in boxes[most]:
            rest.narrow(d, 0, first).zero_()
            rest.narrow(d, first + rows, rest.shape[d] - first - rows).zero_()
            rest = rest.narrow(d, first, rows)
        rest.copy_(grads[most])
        for i, (box, g) in enumerate(zip(boxes, grads, strict=True)):
            if i != most:
                _boxed(out, box).add_(g)
        return out, None


def start(route: Route, like: Tensor, parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Send parts, rank by rank; calling what it returns gives those that came, rank by rank."""
    p = _parcels(route, like.shape, like.element_size())
    return wire.start_parcels(list(parts), p, like, route.group, "halo")


@cached
def _parcels(route: Route, shape: tuple[int, ...], item: int) -> Parcels:
    return of_rows(dict(route.sends), dict(route.gets), shape, route.dim, item)


def resized(shape: Sequence[int], d: int, n: int) -> list[int]:
    """A shape of n rows along d."""
    return [*shape[:d], n, *shape[d + 1 :]]


class _Begin(Function):
    """A tensor that stands for what is on its way.

    tie: what gets a gradient of zeros, by which this is differentiated again on every rank; one
    that gets nothing back sends all the same then. One of a row, as of an exchange before this one,
    gets it always: so that one's backward comes after this one's.
    """

    @staticmethod
    def forward(ctx: Any, route: Route, like: Tensor, tie: Tensor, *parts: Tensor) -> Tensor:
        ctx.materialize_grads = False
        ctx.route, ctx.shape, ctx.parts = route, tie.shape, len(parts)
        token: Any = like.new_zeros(1)
        token.arrived = start(route, like, parts)
        token.row = like.new_empty(resized(like.shape, route.dim, 0))
        return token

    @staticmethod
    def backward(ctx: Any, token: Tensor | None) -> Any:
        if token is None:
            return None, None, None, *[None] * ctx.parts
        came, *rows = _End.apply(ctx.route.back(), token)
        again = torch.is_grad_enabled() or ctx.shape == (1,)
        tied = came.reshape([1] * len(ctx.shape)).expand(ctx.shape) if again else None
        return None, None, tied, *rows


class _End(Function):
    """What came, once it is there."""

    @staticmethod
    def forward(ctx: Any, route: Route, token: Any) -> tuple[Tensor, ...]:
        ctx.materialize_grads = False
        ctx.route, ctx.like = route, token.row
        found = token.new_zeros(1), *token.arrived()
        ctx.shapes = [x.shape for x in found]
        return found

    @staticmethod
    def backward(ctx: Any, *found: Tensor | None) -> Any:
        if all(g is None for g in found):
            return None, None
        pairs = zip(ctx.shapes, found, strict=True)
        grads = [ctx.like.new_zeros(shape) if g is None else g for shape, g in pairs]
        return None, _Begin.apply(ctx.route.back(), ctx.like, *grads)


class _Join(Function):
    """Rows one after the other, and a tie to the exchange: its backward runs on every rank.

    A rank that receives nothing still sends gradients back. What a checkpoint computes again, and
    sends for it, comes before anything that backward sends, on every rank: see `_tie`.
    """

    @staticmethod
    def forward(ctx: Any, d: int, tie: Tensor, *parts: Tensor) -> Tensor:
        ctx.materialize_grads = False
        ctx.d, ctx.tie, ctx.sizes = d, tie, [p.shape[d] for p in parts]
        ctx.save_for_backward(tie.new_empty(0))
        # no view, which refuses to be written to, of a rank that receives nothing
        return torch.cat(parts, d) if len(parts) > 1 else parts[0].detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, *[None] * len(ctx.sizes)
        return None, _tie(ctx, g), *g.split(ctx.sizes, ctx.d)


def _tie(ctx: Any, g: Tensor) -> Tensor:
    """The gradient of the tie, once a checkpoint has computed again what was saved."""
    _ = ctx.saved_tensors
    zero = g.new_zeros(1)
    if not torch.is_grad_enabled():
        return zero
    # of the cotangent and of what came, on every rank: one that has no rows of others, or of which
    # the kernel's adjoint asks for no rows, is differentiated again all the same
    return zero + g.narrow(0, 0, 0).sum() + ctx.tie * 0
