"""Sampling at given places: each rank fetches the rows that its samples touch.

The output is cut as the grid is; where that is whole, as the input is. Where spatial dims of the
input are sharded, each rank turns its coordinates into rows of the whole image as torch does, pads
(clips, reflects) them there, and the ranks tell each other the first and the last row that they
need. So a small displacement moves a few rows. Torch's own op then runs on that window with the
coordinates of the window; in a traced graph, which must hold for other grids, and of small images
on a GPU, which would be waited for, on all rows.

A coordinate of the window is rounded once more than torch's, by no more than torch rounds on the
whole image. So that this cannot change the row below a sample, whose slope is the gradient, samples
keep a distance of that rounding from whole rows; nearest rounds on the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _torch, comm
from ...cache import cached
from ...comm.constants import constant
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec, axes_in, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit, reduced
from .. import labels
from ..empty import stock
from ..extents import Window, by_shard, extent, tell
from ..operands import dims_of, mesh_of
from ..routes import waits

NEAREST, BICUBIC = 1, 2
ZEROS, BORDER, REFLECTION = range(3)
# torch refuses an image without rows: two outside, which nobody sends
_NONE = (-2, 0)
_HALVES = (torch.float16, torch.bfloat16)
# bytes of an image up to which a GPU gets all of its rows
WHOLE = 2**22


class Way(NamedTuple):
    """The arguments of grid_sampler: numbers of the modes, whether corners are centres."""

    mode: int
    padding: int
    align: bool


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> ShardTensor:
    """Torch's op on the rows that this rank's samples touch, fetched where others have them."""
    x, g = (reduced(t) for t in (input, grid))
    way = Way(interpolation_mode, padding_mode, bool(align_corners))
    _check(x, g, way)
    mesh = mesh_of(x, g)
    n = x.ndim - 2
    wanted, out = _plan(*(Spec(mesh, dims_of(t)) for t in (x, g)))
    local, at = fit(mesh, out.varying, (x, wanted.dims), (g, [out.dims[0], *out.dims[2:], Dim(n)]))
    if not any(d.axes for d in wanted.dims[2:]):
        return wrap(_sampled(local, at, way, out), out)
    dtype = _sampled(local.new_zeros([1] * (n + 2)), at.new_zeros([*[1] * (n + 1), n]), way).dtype
    if local.dtype in _HALVES or at.dtype != local.dtype:
        # coordinates of the window would lose what halves have lost already
        local, at = local.float(), at.float()
    local, at, bad = _windowed(local, at, wanted, out, way)
    y = _sampled(local, at, way, out)
    if bad is not None:
        y = y.masked_fill(bad.unsqueeze(1), float("nan"))
    return wrap(y.to(dtype), out)


def _sampled(x: Tensor, at: Tensor, way: Way, out: Spec | None = None) -> Tensor:
    shape = at.shape if out is None else out.local_shape
    return stock(lambda x, at: torch.grid_sampler(x, at, *way), shape, x, at)


def _check(x: Tensor, g: Tensor, way: Way) -> None:
    n = x.ndim - 2
    if x.ndim != g.ndim or n not in (2, 3) or g.shape[-1] != n or x.shape[0] != g.shape[0]:
        raise RuntimeError(
            "grid_sampler(): expected input and grid of 4 or 5 dims, the same batch size and "
            f"{n} coordinates, but got input with sizes {list(x.shape)} and grid with sizes "
            f"{list(g.shape)}"
        )
    if not (0 <= way.mode <= 2 and 0 <= way.padding <= 2):
        # torch asks only in F.grid_sample, where they are names
        raise UnsupportedOpError("grid_sampler of a mode that has no name: use F.grid_sample")
    if n == 3 and way.mode == BICUBIC:
        # torch before 2.15 refuses it
        one = torch.zeros((1, 1, 1, 1, 1), dtype=x.dtype, device=x.device)
        torch.grid_sampler(one, one.new_zeros((1, 1, 1, 1, 3)), *way)
    if 0 in x.shape[2:]:
        raise RuntimeError(
            "grid_sampler(): expected input to have non-empty spatial dimensions, but input has "
            f"sizes {list(x.shape)}"
        )


@cached
def _plan(x: Spec, g: Spec) -> tuple[Spec, Spec]:
    """How the input is wanted, and the output: every mesh axis of either shards the output.

    An axis stays on the input's batch or channels, else on the grid's places, else it moves from
    the input's rows to the output's rows.
    """
    n, c, *rows = x.dims
    if not set(axes_in(rows)).isdisjoint(g.dims[0].axes):
        g = g.whole_in([0])
    # a place of the grid is no label of the input: one mesh axis may cut it and the input's rows
    term = ("n", *(f"p{i}" for i in range(len(g.dims) - 2)))
    known = x.with_dims((n, c)), g.drop([-1])
    p = labels.plan_of((("n", "c"), term, (*term, "c")), None, (0, 1), *known)
    n, *places, c = p.out.dims
    used = set(p.varying)
    for i, d in enumerate(rows):
        if d.size == 1 or not d.axes or set(d.axes) <= used:
            rows[i] = d.whole if d.size == 1 else d
            continue
        free = [j for j in (i, *range(len(places))) if not places[j].axes]
        if not free or not used.isdisjoint(d.axes):
            rows[i] = d.whole
            continue
        size = places[free[0]].size
        places[free[0]] = d if size == d.size else Dim.chunked(size, d.axes, x.mesh)
        used |= set(d.axes)
    return x.with_dims((n, c, *rows)), x.with_dims((n, c, *places))


# windows -----------------------------------------------------------------------------------------


def _windowed(
    x: Tensor, at: Tensor, spec: Spec, out: Spec, way: Way
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows that the samples need, the coordinates in them, which samples are no numbers."""
    n = x.ndim - 2
    cut = [d for d in range(2, x.ndim) if spec.dims[d].axes]
    axes = axes_in([spec.dims[d] for d in cut])
    coordinates = list(at.unbind(-1))
    # the last coordinate is that of the first spatial dim
    # of torch's kernels only the one of volumes on CPUs does not fuse multiplication and addition
    fused = n == 2 or x.device.type != "cpu"
    rows = {d: _rows(coordinates[n + 1 - d].detach(), spec.dims[d].size, way, fused) for d in cut}
    every = _torch.is_tracing() or _few(x, spec)
    # the last extent is empty where all coordinates are finite
    known, bad = [], torch.stack([r.bad for r in rows.values()]).any(0)
    if not every:
        needs = [extent(*_needs(rows[d], way)) for d in cut]
        known = tell([*needs, (bad.new_zeros((), dtype=torch.int64), bad.sum())], spec, axes)
    keep = way.padding != ZEROS and (every or any(k[-1][1] for k in known))
    for i, d in enumerate(cut):
        size = spec.dims[d].size
        low, high = (-4, 4) if way.mode == BICUBIC else (-1, 1) if way.padding == ZEROS else (0, 0)
        windows = ((low, size + high),) * len(spec.dims[d].sizes)
        if not every:
            windows = _taken(spec, out, d, windows, way) or by_shard(known, spec, axes, d, i, _NONE)
        x, start, stop = _fetched(x, d, spec, windows, way)
        c, where = n + 1 - d, rows[d]
        coordinates[c] = _local(coordinates[c], where, start, stop - start, size, way)
    return x, torch.stack(coordinates, -1), bad if keep else None


def _taken(
    spec: Spec, out: Spec, d: int, every: tuple[Window, ...], way: Way
) -> tuple[Window, ...] | None:
    """In a plan, which does not know where samples lie: the windows that it takes for theirs."""
    group, dim, reach = comm.along(spec, d), spec.dims[d], 2 if way.mode == BICUBIC else 1
    if out.dims[d].axes != dim.axes or out.dims[d].size != dim.size:
        return every if comm.spreads(group, "samples are taken to lie in all rows") else None
    if not comm.spreads(group, "samples are taken to lie less than a row from their place"):
        return None
    ends = zip(every, dim.spans, strict=True)
    return tuple(
        (max(e[0], a - reach), min(e[1], b + reach)) if a < b else _NONE for e, (a, b) in ends
    )


def _few(x: Tensor, spec: Spec) -> bool:
    """Whether all rows come sooner than a GPU is waited for, to learn which are needed."""
    return waits(x) and x.element_size() * prod(spec.shape) <= WHOLE


class Rows(NamedTuple):
    """Samples along one dim of the whole image, padded.

    row: the row below, or the nearest. part: the distance to it; None: nearest. slope: of the
    padded coordinate by the given one. outside: samples that touch no row. bad: not finite ones.
    """

    row: Tensor
    part: Tensor | None
    slope: Tensor | float
    outside: Tensor
    bad: Tensor


def _rows(g: Tensor, size: int, way: Way, fused: bool) -> Rows:
    """The coordinates g in [-1, 1] as rows of the image (aten/native/GridSampler.h)."""
    # infinities are clipped to the outer rows, as all beyond [-1, 1]
    clipped = way.padding == BORDER and way.mode != BICUBIC
    bad = g.isnan() if clipped else ~g.isfinite()
    far = 3.0 if clipped else 0.0
    at = _scaled(g.nan_to_num(0.0, far, -far), size, way.align, fused)
    slope: Tensor | float = 1.0
    if way.padding == REFLECTION:
        at, slope = _reflected(at, size, way.align)
    if way.padding != ZEROS and way.mode != BICUBIC:
        slope = slope * ((at > 0) & (at < size - 1)).to(at.dtype)
        at = at.clamp(0, size - 1)
    elif way.padding == BORDER:
        at = at.clamp(-2, size + 1)
    if way.mode == NEAREST:
        row = at.round()
        return Rows(row, None, slope, bad | (row < 0) | (row >= size), bad)
    row = at.floor()
    if way.padding != ZEROS and way.mode != BICUBIC:
        row = row.clamp(max=size - 2)
    reach = 2 if way.mode == BICUBIC else 1
    outside = (row < -reach) | (row > size + reach - 2)
    return Rows(row, at - row, slope, bad | (outside & (way.padding == ZEROS)), bad)


def _scaled(g: Tensor, size: int, align: bool, fused: bool) -> Tensor:
    """Rows of normalised coordinates; fused: a product less a half is rounded once."""
    if align:
        return (g + 1) / 2 * (size - 1)
    if not fused:
        return ((g + 1) * size - 1) / 2
    a, b = g + 1, size / 2
    if a.dtype is torch.float32:
        return (a.double() * b - 0.5).float()
    # a product and what its rounding lost (Dekker 1971)
    high = a * 134217729.0
    high = high - (high - a)
    product = a * b
    return (product - 0.5) + ((high * b - product) + (a - high) * b)


def _reflected(at: Tensor, size: int, align: bool) -> tuple[Tensor, Tensor]:
    """Coordinates reflected at the centres of the outer rows (align) or at their edges."""
    low, span = (0.0, size - 1) if align else (-0.5, size)
    if span == 0:
        return torch.zeros_like(at), torch.zeros_like(at)
    at = at - low
    sign = torch.where(at < 0, -1.0, 1.0).to(at.dtype)
    at = at.abs()
    extra = at.fmod(span)
    odd = (at / span).floor() % 2 == 1
    return torch.where(odd, span - extra, extra) + low, torch.where(odd, -sign, sign)


def _needs(rows: Rows, way: Way) -> tuple[Tensor, Tensor]:
    """Row numbers among which are the first and the last that are needed, and which count."""
    before, behind = {NEAREST: (0, 1), BICUBIC: (-1, 2)}.get(way.mode, (0, 1))
    row = rows.row.masked_fill(rows.bad, 0)
    return (
        torch.stack([row + before, row + behind]),
        torch.stack([~rows.outside, ~rows.outside]),
    )


def _fetched(
    x: Tensor, d: int, spec: Spec, windows: Sequence[Window], way: Way
) -> tuple[Tensor, int, int]:
    """(rows [start, stop) of the padded image, start, stop)."""
    dim = spec.dims[d]
    start, stop = windows[spec.index[d]]
    group = comm.along(spec, d)
    if way.mode != BICUBIC or way.padding == ZEROS:
        return comm.window(x, d, dim.sizes, windows, group), start, stop
    # all taps are rows of the window, so that torch does not pad them
    sources = [_sources(a, b, dim.size, way) for a, b in windows]
    inner = [(min(s), max(s) + 1) for s in sources]
    x = comm.window(x, d, dim.sizes, inner, group)
    mine = sources[spec.index[d]]
    if mine != list(range(*inner[spec.index[d]])):
        x = x.index_select(d, constant(tuple([s - min(mine) for s in mine]), torch.int64, x))
    return x, start, stop


def _sources(a: int, b: int, size: int, way: Way) -> list[int]:
    """The row of the image for each padded row; rows that nobody needs stay outside."""
    if (a, b) == _NONE:
        return list(range(a, b))
    if way.padding == BORDER:
        return [min(max(r, 0), size - 1) for r in range(a, b)]
    period = max(1, 2 * (size - 1)) if way.align else 2 * size
    last = period if way.align else period - 1
    return [min(r % period, last - r % period) for r in range(a, b)]


def _local(g: Tensor, rows: Rows, start: int, length: int, size: int, way: Way) -> Tensor:
    """Normalised coordinates in the window, whose gradient is that of the global ones."""
    whole, part = (size - 1, length - 1) if way.align else (size, length)
    at = rows.row - start
    if rows.part is not None:
        gap = 1.5 * torch.finfo(g.dtype).eps * part
        apart = rows.part.clamp(gap, 1 - gap)
        # the slope is continuous for cubics, and zero where samples were clipped
        if way.mode == BICUBIC:
            apart = rows.part
        elif isinstance(rows.slope, Tensor):
            apart = apart.where(rows.slope != 0, rows.part)
        at = at + apart
    at = at.masked_fill(rows.outside, 0.5 if way.padding != ZEROS else -10.0)
    target = (2 * at + (0 if way.align else 1)) / part - 1
    if way.padding == ZEROS:
        target = target.masked_fill(rows.bad, float("nan"))
    if not _torch.differentiated(g):
        return target
    slope = rows.slope if isinstance(rows.slope, Tensor) else torch.ones_like(target)
    slope = slope.masked_fill(rows.outside, 0.0)
    known = g.nan_to_num(0.0, 0.0, 0.0)
    return target + (known - known.detach()) * (slope * (whole / part))


# affine grids ------------------------------------------------------------------------------------


@rule("affine_grid_generator")
def affine_grid(theta: ShardTensor, size: Sequence[int], align_corners: bool) -> ShardTensor:
    """A grid for each matrix: sharded along the batch as these are."""
    x = reduced(theta)
    batch = x._spec.dims[0]
    if len(size) not in (4, 5) or int(size[0]) != batch.size:
        raise RuntimeError(f"affine_grid: theta {tuple(x.shape)} for an output of {list(size)}")
    spec = x._spec.with_dims([batch, *whole_dims(x.shape[1:])])
    (local,) = fit(spec.mesh, spec.varying, (x, spec.dims))
    # torch refuses an empty batch
    shape = [max(1, local.shape[0]), *map(int, size[1:])]
    grid = stock(
        lambda z: torch.affine_grid_generator(z, shape, align_corners), local.shape[:1], local
    )
    return wrap(grid, spec.with_dims([batch, *whole_dims(grid.shape[1:])]))
