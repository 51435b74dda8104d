"""Points that a search by radius can find, brought to the ranks whose queries may find them.

For searches by somebody else's kernel, which sees plain tensors: what it finds among these points
is what it finds among all, if it looks at each pair of a query and a point by itself and takes
points in the order of their indices.

Cost: the boxes of all chunks (2 D numbers for `chunk` points) go to all ranks, then in three
exchanges which chunks are asked for, the indices of their points, and the points, each once; in
backward their gradients return. Of a cloud in the order of `partition` that is what lies beside a
rank's own part, of one in no order up to all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _torch, comm
from ...comm import groups
from ...comm.route import Route, fetch
from ...comm.rows import exchange_rows
from ...cuts import cut
from ...errors import UnsupportedOpError
from .curves import morton_order
from .pairs import Met, wide

_CHUNK = 256
# how far kernels that round otherwise may look beyond the radius, of the radius and of coordinates
_SLACK, _ROUNDING = 1e-3, 1e-5


class Near(NamedTuple):
    """Points (n, D), with their gradients, in the order of their global indices `at` (n,)."""

    rows: Tensor
    at: Tensor


def near(met: Met, radius: float, chunk: int = _CHUNK) -> Near:
    """The points within a radius of this rank's queries, and some more around them."""
    if len(met.sizes) == 1:
        return Near(met.rows, torch.arange(len(met.rows), device=met.rows.device))
    if _torch.is_tracing():
        raise UnsupportedOpError(
            "a search by radius depends on values and cannot be compiled: leave it out of "
            "st.compile"
        )
    if not groups.knows_values(met.group):
        # clouds are compact: little lies within reach of others
        groups.spreads(met.group, "what is within reach is taken to be a rank's own")
        route, index = _own(met)
    else:
        with torch.no_grad():
            route, index = _asked(met, radius, chunk)
    return Near(fetch(met.rows, route), index)


def _own(met: Met) -> tuple[Route, Tensor]:
    """The way of this rank's rows to itself."""
    me, n = comm.rank(met.group), len(met.rows)
    counts = tuple(n if r == me else 0 for r in range(len(met.sizes)))
    own = torch.arange(n, device=met.rows.device)
    route = Route(own, counts, counts, None, max(met.sizes), met.group)
    return route, own + cut(met.sizes).offsets[me]


def _asked(met: Met, radius: float, chunk: int) -> tuple[Route, Tensor]:
    """The way of the chunks within reach of this rank's queries, and their points' indices."""
    points, sizes, group = wide(met.rows.detach()), met.sizes, met.group
    me, device = comm.rank(group), points.device
    order = morton_order(points, 63)
    parts = [-(-size // chunk) for size in sizes]
    boxes = comm.gather(_boxes(points[order], chunk), 0, parts, group)
    queries = wide(met.asking.detach())
    own = _boxes(queries[morton_order(queries, 63)], chunk)
    named = _within(own, boxes, radius)
    asked = exchange_rows(named, parts, [parts[me]] * len(sizes), group, "points")
    # rows by the rank that asks for them
    wanted = asked.view(len(sizes), parts[me]).repeat_interleave(chunk, 1)[:, : sizes[me]]
    rows = order.expand(len(sizes), -1)[wanted]
    lengths = torch.tensor(
        [min(chunk, size - a) for size in sizes for a in range(0, size, chunk)],
        dtype=torch.int64, device=device,
    )  # fmt: skip
    each = torch.tensor(parts, device=device)
    owners = torch.arange(len(sizes), device=device).repeat_interleave(each)
    got = lengths.new_zeros(len(sizes)).index_add_(0, owners, lengths * named)
    gives, gets = torch.stack([wanted.sum(1), got]).tolist()
    index = exchange_rows(rows, gives, gets, group, "points")
    first = torch.tensor(cut(sizes).offsets[:-1], device=device)
    index, place = (index + first.repeat_interleave(got, output_size=sum(gets))).sort()
    return Route(rows, tuple(gives), tuple(gets), place, max(sizes), group), index


def _boxes(points: Tensor, chunk: int) -> Tensor:
    """The bounding boxes of chunks: (chunks, 2, D), low and high ends."""
    if not len(points):
        return points.new_zeros(0, 2, points.shape[1])
    return torch.stack([torch.stack([p.amin(0), p.amax(0)]) for p in points.split(chunk)])


def _within(queries: Tensor, boxes: Tensor, radius: float) -> Tensor:
    """Which boxes are within reach of one of the queries' boxes; those with NaN are."""
    if not queries.numel() or not boxes.numel():
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    most = torch.maximum(queries.abs().amax(), boxes.abs().amax())
    reach = radius * (1 + _SLACK) + most * _ROUNDING
    named = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for low, high in queries.unbind(0):
        gap = torch.maximum(boxes[:, 0] - high, low - boxes[:, 1]).clamp(min=0)
        named |= ~(gap.square().sum(1) > reach * reach)
    return named
