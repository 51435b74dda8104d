"""A transposed convolution with its halo in flight, without a copy of the input: see `halo`.

That of the shard makes the rows of the result that the shard reaches, which are its own and some of
its neighbours'; those of the strips beside it add to its own rows at either end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...cache import cached
from ...cuts import table
from ...spec import Spec
from ..overlap import route
from ..sliding import Reads
from ..strips import Side, beside, ends
from ..windows import Reach, Stencil
from .halo import Halo, Settings, Strip


class Reached(NamedTuple):
    """How the result of a dim lies over what this rank has of the input.

    start: the first own row of the result among those that the shard reaches; behind: how many it
    reaches after the last own one. above, below: rows of the neighbours that reach own rows. up,
    down: own rows that reach theirs. travel: whether any rank's do.
    """

    start: int
    behind: int
    above: int
    below: int
    up: int
    down: int
    travel: bool


@cached
def reached(spec: Spec, d: int, stencil: Stencil, reach: Reach) -> Reached | None:
    """Of this rank; None, on all ranks, where strips do not serve the dim.

    They do where every rank reaches all of its own rows of the result, and beside them its direct
    neighbours alone do.
    """
    dim, me = spec.dims[d], spec.index[d]
    edges, out, stride = dim.edges, reach.dim.edges, stencil.stride
    a, b = edges[:-1], edges[1:]
    start = out[:-1] - (a * stride - stencil.before)
    behind = (b - 1) * stride - stencil.before + stencil.extent - out[1:]
    # rows outside are zeros, which reach nothing
    windows = table(reach.windows).clip(0, dim.size)
    above, below = (a - windows[:, 0]).clip(0), (windows[:, 1] - b).clip(0)
    sizes = b - a
    served = (start >= 0) & (behind >= 0) & (np.diff(out) > 0) & (sizes > 0)
    served &= stencil.extent >= stride
    if not served.all() or (above[1:] > sizes[:-1]).any() or (below[:-1] > sizes[1:]).any():
        return None
    return Reached(int(start[me]), int(behind[me]), *beside(above, below, me))


def laid_transposed(spec: Spec, reads: Reads, joined: Settings) -> tuple[Halo | None, Reads]:
    """(how a transposed convolution runs on this rank, what is read otherwise).

    reads: of dims that are cut, joined: of the rows that are read in them. None where no dim is
    served.
    """
    served, rest, settings = [], [], joined
    for d, stencil, reach in reads:
        own = None if stencil is None else reached(spec, d, stencil, reach)
        if own is None or stencil is None:
            rest.append((d, stencil, reach))
        else:
            settings = _of_shard(settings, d, stencil, own, reach.dim.sizes[spec.index[d]])
            served.append((d, stencil, reach, own))
    if not served:
        return None, reads
    inner, fetched, sides, reaches = settings, settings, [], []
    for d, stencil, reach, own in served:
        if not own.travel:
            continue
        rows, size = reach.dim.sizes[spec.index[d]], spec.dims[d].sizes[spec.index[d]]
        strips = []
        if own.above:
            first = own.start + own.above * stencil.stride
            # of the last row, what lies among the own ones
            outputs = min(rows, stencil.extent - stencil.stride - own.start)
            of = _all(inner, d, first, outputs)
            strips.append(_strip(False, own.above, outputs, stencil.size, of))
        if own.below:
            # the first own row of the result that the row behind the shard reaches
            begin = size * stencil.stride - own.start
            of = _all(inner, d, max(0, -begin), rows - max(0, begin))
            strips.append(_strip(True, own.below, rows - max(0, begin), stencil.size, of))
        i, crop = d - 2, next((c for c in joined.crops if c[0] == d), None)
        fetched = _along(fetched, d, joined.padding[i], (joined.more or ())[i], crop)
        _, way, _ = route(spec, d, reach)
        sides.append(
            Side(d, way, way.back(), ends(own.up, own.down), own.above, own.below, tuple(strips))
        )
        reaches.append((d, reach))
        inner = _all(inner, d, own.start + own.above * stencil.stride, rows)
    return Halo(spec, tuple(reaches), settings, tuple(sides), fetched), tuple(rest)


def _of_shard(settings: Settings, d: int, stencil: Stencil, own: Reached, rows: int) -> Settings:
    """With what the op gets for the shard along d, and the crop where it cannot do without."""
    short = own.start - own.behind
    if own.start < stencil.extent and 0 <= short < max(stencil.stride, stencil.dilation):
        # its own padding takes as many off both ends, its output padding gives some back
        return _along(settings, d, own.start, short, None)
    pad = min(own.start, own.behind, stencil.extent - 1)
    return _along(settings, d, pad, 0, (d, own.start - pad, rows))


def _all(settings: Settings, d: int, start: int, rows: int) -> Settings:
    """With all that is reached along d, of which these rows count."""
    return _along(settings, d, 0, 0, (d, start, rows))


def _along(
    settings: Settings, d: int, pad: int, more: int, crop: tuple[int, int, int] | None
) -> Settings:
    padding, given = list(settings.padding), list(settings.more or ())
    padding[d - 2], given[d - 2] = pad, more
    crops = [c for c in settings.crops if c[0] != d] + ([crop] if crop else [])
    return settings._replace(padding=tuple(padding), more=tuple(given), crops=tuple(crops))


def _strip(below: bool, rows: int, outputs: int, taps: int, inner: Settings) -> Strip:
    return Strip(below, rows, outputs, 0, taps, rows, inner)
