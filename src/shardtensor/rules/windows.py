"""Stencils along one sharded dim: which input rows a rank's output rows need.

A `Reach` is the plan for one dim, the same on every rank; `fetch` brings this rank's input rows and
`trim` drops what an op made of them beside this rank's output rows. What reads what is told by
`strided` (kernels), `spread` (their adjoints), `near` (own rows and neighbours), or by hand
(`reach_of`). An op over two sharded dims plans and fetches them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .. import comm
from ..cache import cached
from ..comm.formats import compact
from ..cuts import Kept, pairs, table
from ..spec import Dim, Spec
from .empty import in_place_of

Ints = int | Sequence[int]


def each(v: Ints, n: int) -> tuple[int, ...]:
    """One value for each of n spatial dims."""
    if isinstance(v, int):
        return (v,) * n
    if len(v) not in (0, 1, n):
        raise RuntimeError(f"expected a single integer or a list of {n} values, got {list(v)}")
    return tuple(v) * n if len(v) == 1 else tuple(v)


class Stencil(NamedTuple):
    """Output row j reads input rows j * stride - before + t * dilation for t in range(size).

    before, after: rows of padding (after: as many as before, if None). ceil: whether a last partial
    output counts, if it starts within the input or the padding before.
    """

    size: int
    stride: int = 1
    before: int = 0
    dilation: int = 1
    after: int | None = None
    ceil: bool = False

    @property
    def extent(self) -> int:
        """The rows from the first to the last that one output reads."""
        return (self.size - 1) * self.dilation + 1

    def outputs(self, rows: int) -> int:
        """How many outputs `rows` input rows make; 0 or less where they are too few for one."""
        after = self.before if self.after is None else self.after
        span = rows + self.before + after - self.extent
        out = (-(-span // self.stride) if self.ceil else span // self.stride) + 1
        return out - (self.ceil and (out - 1) * self.stride >= rows + self.before)


def stencils(n: int, *values: Ints) -> tuple[Stencil, ...]:
    """Stencils of n spatial dims from torch's kernel, stride, padding, dilation."""
    return tuple(
        [checked(Stencil(*row)) for row in zip(*(each(v, n) for v in values), strict=True)]
    )


def checked(s: Stencil) -> Stencil:
    """The stencil; RuntimeError, as torch raises, for one that no kernel has."""
    if s.size < 1 or s.stride < 1 or s.dilation < 1:
        raise RuntimeError(
            "kernel size, stride and dilation should be greater than zero, but got "
            f"{s.size}, {s.stride}, {s.dilation}"
        )
    if s.before < 0:
        raise RuntimeError(f"negative padding is not supported: {s.before}")
    return s


class Reach(NamedTuple):
    """The output dim, and the input rows [start, stop) of every rank; they may lie outside.

    A rank without output rows may get rows outside, enough for one output row, so that it runs the
    op all the same and its weights take part in the backward. inside: no rank needs a row of
    another, or one outside.
    """

    dim: Dim
    windows: tuple[tuple[int, int], ...]
    inside: bool


@cached
def strided(dim: Dim, stencil: Stencil, alone: bool = False) -> Reach:
    """The output rows of a stencil and what they read.

    Rows are cut where input rows are, at kernel centres: halos are the same on both sides. Where
    there are as many as input rows, they lie as these. alone: see `_held`.
    """
    span, stride, before = stencil.extent - 1, stencil.stride, stencil.before
    out = max(0, stencil.outputs(dim.size))
    centre = 0 if stride == 1 and out == dim.size else span // 2 - before
    ends = _cut(out, -((centre - dim.edges) // stride))
    if alone:
        ends = _held(dim, out, lambda a: -((-a - before) // stride),
                     lambda b: (b + before - span - 1) // stride + 1)  # fmt: skip
    a, b = ends[:-1], ends[1:]
    starts = np.where(a < b, a * stride - before, -span - 1)
    stops = np.where(a < b, (b - 1) * stride - before + span + 1, 0)
    return reach_of(dim, ends, pairs(starts, stops))


@cached
def spread(
    dim: Dim, stencil: Stencil, out: int, alone: bool = False
) -> tuple[Reach, tuple[int, ...]]:
    """The adjoint of a stencil: input row i adds to the output rows that the stencil's row i reads.

    out: how many there are. Also returns, for every rank, its first output row among those that its
    window adds to with no padding. Neighbours share the output rows that both add to; a kernel as
    wide as its stride needs no halo. alone: see `_held`.
    """
    span, stride, padding = stencil.extent - 1, stencil.stride, stencil.before
    shared = max(0, -(-(span + 1 - stride) // 2))
    ends = _cut(out, dim.edges * stride - padding + shared)
    if alone:
        ends = _held(dim, out, lambda a: (a - 1) * stride + span - padding + 1,
                     lambda b: b * stride - padding)  # fmt: skip
    has = ends[:-1] < ends[1:]
    first, last = ends[:-1] + padding, ends[1:] - 1 + padding
    # the second bound where rows lie in a gap between kernels
    start = np.minimum(-((span - first) // stride), first // stride)
    windows = pairs(np.where(has, start, -1), np.where(has, last // stride + 1, 0))
    return reach_of(dim, ends, windows), tuple(np.where(has, first - start * stride, 0).tolist())


@cached
def added_to(dim: Dim, stencil: Stencil) -> Kept[tuple[int, int]]:
    """The output rows that each rank's own input rows add to in the adjoint of a stencil."""
    stride, before = stencil.stride, stencil.before
    return Kept(
        (a * stride - before, (b - 1) * stride - before + stencil.extent) if a < b else (0, 0)
        for a, b in dim.spans
    )


@cached
def near(dim: Dim, beside: int, out: int, alone: bool = False) -> tuple[Reach, tuple[int, ...]]:
    """Every rank's own rows and `beside` more on either side, fewer at the border of the whole.

    For an op that treats the border by itself and makes `out` rows of all: of each rank's own, its
    share. Also returns, for every rank, its first output row among those of its window. alone: see
    `_held`.
    """
    n = dim.size
    if alone:
        dim = dim.cut_at(_held(dim, n, lambda a: a + beside, lambda b: b - beside).tolist())
    ends = [o * out // n for o in dim.offsets]
    windows = [(max(0, a - beside), min(n, b + beside)) if a < b else (a, a) for a, b in dim.spans]
    firsts = [(a - start) * out // n for a, (start, _) in zip(dim.offsets, windows, strict=False)]
    return reach_of(dim, ends, windows), tuple(firsts)


def _cut(out: int, edges: Any) -> Any:
    """Shard boundaries of `out` rows: 0, the inner ones clamped, out."""
    ends = edges.clip(0, out)
    ends[0], ends[-1] = 0, out
    return ends


def _held(dim: Dim, out: int, first: Callable[[int], int], end: Callable[[int], int]) -> Any:
    """Where `out` rows are cut if the middle shard is all there is: it makes what it can by itself.

    first, end: of the rows that need none before, or behind, a row inside of the whole.
    """
    me = len(dim.sizes) // 2
    a, b = dim.offsets[me], dim.offsets[me + 1]
    start = min(max(first(a), 0), out) if a else 0
    stop = out if b == dim.size else min(max(end(b), start), out)
    ends = np.zeros(len(dim.sizes) + 1, np.int64)
    ends[1 : me + 1], ends[me + 1 :], ends[-1] = start, stop, out
    return ends


def reach_of(dim: Dim, ends: Sequence[int], windows: Sequence[tuple[int, int]]) -> Reach:
    """Output rows cut at `ends`, of which those of each rank read a window of rows of a dim."""
    sizes = np.diff(ends)
    starts, stops = table(windows).T
    inside = (sizes == 0) | ((starts >= dim.edges[:-1]) & (stops <= dim.edges[1:]))
    return Reach(Dim(int(ends[-1]), dim.axes, sizes.tolist()), Kept(windows), bool(inside.all()))


def fetch(x: Tensor, d: int, spec: Spec, reach: Reach, fill: float = 0.0, lead: int = 0) -> Tensor:
    """This rank's input rows along dim d of its local tensor x; rows outside are `fill`.

    x may have been fetched along other dims of `spec` before, and may have `lead` dims in front of
    those of `spec`. Sends halo rows only, nothing where `reach.inside`.
    """
    rows, plan, group = _fetching(spec, d, reach)
    if plan is None:
        return x.narrow(d + lead, *rows) if rows else x
    if reach.inside:
        # a rank without outputs, of which the others have none either
        start, stop = reach.windows[spec.index[d]]
        none = x.narrow(d + lead, 0, 0)
        shape = [stop - start if i == d + lead else n for i, n in enumerate(x.shape)]
        return in_place_of(none, none.new_full(shape, fill))
    return comm.windowed(x, d + lead, plan, group, fill)


@cached
def _fetching(spec: Spec, d: int, reach: Reach) -> tuple[tuple[int, int] | None, Any, str]:
    """(which of its own rows (start, length) this rank reads, None: all; else the plan, group)."""
    dim, me = spec.dims[d], spec.index[d]
    start, stop = reach.windows[me]
    here = spec.alone and spec.offset[d] <= start and stop <= spec.offset[d] + dim.sizes[me]
    if (reach.inside or here) and reach.dim.sizes[me]:
        first, length = start - spec.offset[d], stop - start
        return (None if (first, length) == (0, dim.sizes[me]) else (first, length)), None, ""
    group = comm.along(spec, d)
    return None, comm.planned(dim.sizes, reach.windows, group), group


def trim(y: Tensor, d: int, spec: Spec, reach: Reach, first: int | None = None) -> Tensor:
    """The local output without the row that stands in for no rows.

    first: this rank's first row among those that an op made of its window, where it made more.
    """
    rows = reach.dim.sizes[spec.index[d]]
    if first is None:
        return y if rows else y.narrow(d, 0, 0)
    return y if rows == y.shape[d] else compact(y.narrow(d, first, rows), y)
