"""F.interpolate over sharded dims: a linear map of rows, whose weights torch itself tells.

Where every row becomes a whole number of rows, or a whole number of rows of each shard becomes one,
torch's kernel runs on a window with a halo and the halo's outputs are dropped. In all other cases
each output row of a sharded dim is a sum of a few input rows; their indices and weights are read
off torch's own interpolation of small test signals, so every mode, scale and rounding is torch's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, floor
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import kernels
from ...cache import cached
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, whole_dims
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import reduced
from ..windows import Reach, fetch, near, reach_of, trim
from .pool import result_dtype

_KERNELS: dict[tuple[str, int], Callable[..., Tensor]] = {
    ("nearest", 1): kernels.nn.upsample_nearest1d,
    ("nearest", 2): kernels.nn.upsample_nearest2d,
    ("nearest", 3): kernels.nn.upsample_nearest3d,
    ("nearest-exact", 1): kernels.nn._upsample_nearest_exact1d,
    ("nearest-exact", 2): kernels.nn._upsample_nearest_exact2d,
    ("nearest-exact", 3): kernels.nn._upsample_nearest_exact3d,
    ("linear", 1): kernels.nn.upsample_linear1d,
    ("bilinear", 2): kernels.nn.upsample_bilinear2d,
    ("trilinear", 3): kernels.nn.upsample_trilinear3d,
    ("bicubic", 2): kernels.nn.upsample_bicubic2d,
}
_ANTIALIASED: dict[str, Callable[..., Tensor]] = {
    "bilinear": kernels.nn._upsample_bilinear2d_aa,
    "bicubic": kernels.nn._upsample_bicubic2d_aa,
}
_FEW = 4  # taps up to which a sum of slices is cheaper than one gather of all
Scales = tuple[float | None, ...]
T = TypeVar("T")


class Way(NamedTuple):
    """How rows are interpolated: all that decides indices and weights but the sizes."""

    mode: str
    spatial: int
    align: bool
    antialias: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def nearest(self) -> bool:
        return self.mode.startswith("nearest")


@rule(F.interpolate)
def interpolate(
    input: ShardTensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Each rank fetches the rows that its rows of the result are made of."""
    x = reduced(input)
    n = x.ndim - 2
    out, scales = _sizes(x, n, size, scale_factor, recompute_scale_factor, mode)
    if mode in ("nearest", "nearest-exact", "area") and align_corners is not None:
        raise ValueError(f"interpolate: align_corners does not go with mode {mode}")
    if antialias and (mode not in _ANTIALIASED or n != 2):
        raise ValueError("Anti-alias option is restricted to bilinear and bicubic modes")
    if mode == "area":
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[n - 1]
        return pool(x, tuple(out))  # type: ignore[arg-type]
    if (mode, n) not in _KERNELS:
        raise NotImplementedError(f"interpolate: mode {mode} for a tensor of {x.ndim} dims")
    sharded = [d for d in range(2, x.ndim) if x._spec.dims[d].axes]
    way = Way(mode, n, bool(align_corners), antialias, x.dtype, x.device)
    if not sharded:
        local = _kernel(x._local, out, scales, way).to(_dtype(x, way))
        return wrap(local, x._spec.with_dims([*x._spec.dims[:2], *whole_dims(out)]))
    halos = [_halo(x._spec.dims[d], out[d - 2], scales[d - 2], way) for d in sharded]
    if None not in halos:
        found = _scaled(x, out, scales, way, dict(zip(sharded, halos, strict=True)))  # type: ignore[arg-type]
    else:
        found = _combined(x, out, scales, way, sharded)
    return layout.like_image(found, x)


def _sizes(
    x: ShardTensor, n: int, size: Any, scale_factor: Any, recompute: bool | None, mode: str
) -> tuple[list[int], Scales]:
    """(output sizes, the scale factors that the coordinates use; None: the ratio of sizes)."""
    if (size is None) == (scale_factor is None):
        raise ValueError("either size or scale_factor should be defined, and not both")
    given = scale_factor if size is None else size
    given = list(given) if isinstance(given, list | tuple) else [given] * n
    if len(given) != n:
        raise ValueError(f"interpolate: {len(given)} sizes or scales for {n} spatial dims")
    if size is None:
        out = [floor(float(m) * float(s)) for m, s in zip(x.shape[2:], given, strict=True)]
    elif recompute:
        raise ValueError("recompute_scale_factor is not meaningful with an explicit size.")
    else:
        out = [int(m) for m in size] if isinstance(size, list | tuple) else [int(size)] * n
    if mode != "area" and min([*out, *x.shape[2:]]) <= 0:
        raise RuntimeError(f"interpolate of {x._spec} to {out}: sizes must be greater than 0")
    scales = (None,) * n if size is not None or recompute else tuple(float(s) for s in given)
    return out, scales


def _kernel(
    local: Tensor, out: Sequence[int], scales: Sequence[float | None], way: Way, wide: bool = False
) -> Tensor:
    """Torch's own kernel, also for a tensor without elements, which torch refuses.

    wide: that the local tensor is a part of one whose output has several columns. Torch 2.13
    antialiases rows of a single column wrongly, so that a shard of one runs as two.
    """
    if local.numel() == 0:
        return local.new_zeros([*local.shape[:2], *out]) + local.sum(dtype=local.dtype)
    if way.nearest:
        return _KERNELS[way.mode, len(out)](local, list(out), *scales)
    if not way.antialias:
        return _KERNELS[way.mode, len(out)](local, list(out), way.align, *scales)
    single = wide and local.shape[-1] == out[-1] == 1
    if single:
        local, out = local.expand(*local.shape[:-1], 2), [*out[:-1], 2]
    found = _ANTIALIASED[way.mode](local, list(out), way.align, *scales)
    return found.narrow(-1, 0, 1) if single else found


def _dtype(x: ShardTensor, way: Way) -> torch.dtype:
    n = way.spatial
    return result_dtype(x, n, lambda some: _kernel(some, [2] * n, [None] * n, way))


def _alone(fn: Callable[[], T]) -> T:
    """fn() on a thread of its own: real tensors, also while this one traces or autocasts."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(fn()))
    thread.start()
    thread.join()
    return found[0]


# whole-number scales -----------------------------------------------------------------------------


@cached
def _halo(dim: Dim, m: int, scale: float | None, way: Way) -> int | None:
    """The input rows that torch's kernel needs on either side of a shard's own for the shard's own
    outputs; None where it cannot be run on shards.
    """
    n = dim.size
    reach = 0 if way.nearest else 2 if way.mode == "bicubic" else 1
    if m == n:
        # rows of a weight of zero, which NaN is not lost by
        beside = reach if way.mode == "bicubic" or way.antialias else 0
        return beside if scale in (None, 1.0) else None
    if way.align:
        return None
    if m % n == 0:
        times = m // n
        if scale not in (None, times):
            return None
        if way.nearest:
            rows = _alone(lambda: _sources(n, m, scale, way).tolist())
            return 0 if rows == [j // times for j in range(m)] else None
        # coordinates count from the window's start, which float32 rounds alike only for powers of 2
        alike = times & (times - 1) == 0 or way.dtype is not torch.float32
        return reach if alike else None
    if n % m or any(o % (n // m) for o in dim.offsets):
        return None
    by = n // m
    if scale is not None and 1 / scale != by:
        return None
    if way.antialias:
        return reach * by
    return by if way.mode == "bicubic" and by in (2, 3) else 0


def _scaled(
    x: ShardTensor, out: Sequence[int], scales: Scales, way: Way, halos: dict[int, int]
) -> ShardTensor:
    local, dims = x._local, [*x._spec.dims[:2], *whole_dims(out)]
    target, crops = list(out), []
    for d, halo in halos.items():
        reach, firsts = near(x._spec.dims[d], halo, out[d - 2], x._spec.alone)
        local = fetch(local, d, x._spec, reach)
        dims[d], target[d - 2] = reach.dim, local.shape[d] * out[d - 2] // x.shape[d]
        crops.append((d, reach, firsts[x._spec.index[d]]))
    local = _kernel(local, target, scales, way, out[-1] > 1).to(_dtype(x, way))
    for d, reach, first in crops:
        local = trim(local, d, x._spec, reach, first)
    return wrap(local, x._spec.with_dims(dims))


@cached
# any other map of rows ---------------------------------------------------------------------------


class Taps(NamedTuple):
    """One dim's map of rows.

    reach: the input rows that every rank needs.
    at: (taps, rows) positions in this rank's window. weights: as many, None for nearest. Rows that
    torch multiplies by zero are among them: zero times NaN is NaN.
    """

    reach: Reach
    at: Tensor
    weights: Tensor | None


def _combined(
    x: ShardTensor, out: Sequence[int], scales: Scales, way: Way, sharded: Sequence[int]
) -> ShardTensor:
    """Each output row from a few input rows, by indices and weights read off torch."""
    if not way.nearest and not x.is_floating_point():
        raise UnsupportedOpError(
            f"interpolate of {x.dtype} {x._spec} to {list(out)} in mode {way.mode}: torch rounds "
            "integers in its own way; convert to float first"
        )
    dtype = _dtype(x, way)
    local, dims = x._local, [*x._spec.dims[:2], *whole_dims(out)]
    target, rest = list(out), list(scales)
    for d in range(2, x.ndim):
        dim, i, scale = x._spec.dims[d], x._spec.index[d], rest[d - 2]
        if d in sharded:
            taps = _map(dim, i, out[d - 2], scale, way)
            local = _weighted(fetch(local, d, x._spec, taps.reach), d, taps)
            dims[d], target[d - 2], rest[d - 2] = taps.reach.dim, local.shape[d], None
        elif not way.nearest:
            # of all dims together the kernel would multiply rows of those that are done by zero
            local = _along(local, d, out[d - 2], scale, way)
    if way.nearest and (target != [*local.shape[2:]] or any(s not in (None, 1.0) for s in rest)):
        local = _kernel(local, target, rest, way)
    return wrap(local.to(dtype), x._spec.with_dims(dims))


def _along(local: Tensor, d: int, m: int, scale: float | None, way: Way) -> Tensor:
    """A plain image with m rows along one dim, by a kernel for lines where there is one."""
    n = local.shape[d]
    if d < local.ndim - 1 or not (way.antialias or way.mode.endswith("linear")):
        taps = _map(Dim(n, (), (n,)), 0, m, scale, way)
        start, stop = taps.reach.windows[0]
        return _weighted(local.narrow(d, start, stop - start), d, taps)
    lines = local.flatten(1, -2)
    if way.antialias:
        found = _kernel(lines.unsqueeze(2), [1, m], [None, scale], way, m > 1)
    else:
        found = _kernel(lines, [m], [scale], way._replace(mode="linear", spatial=1))
    return found.view(*local.shape[:-1], m)


def _weighted(rows: Tensor, d: int, taps: Taps) -> Tensor:
    """Output rows as sums of input rows; halves are added up in single precision."""
    if taps.weights is None:
        return rows.index_select(d, taps.at[0])
    n, m = taps.weights.shape
    shape = [m] + [1] * (rows.ndim - 1 - d)
    if n <= _FEW:
        parts = [
            rows.index_select(d, at) * w.view(shape)
            for at, w in zip(taps.at, taps.weights, strict=True)
        ]
        return sum(parts[1:], start=parts[0])
    every = rows.index_select(d, taps.at.flatten()).unflatten(d, (n, m))
    return (every * taps.weights.view([n, *shape])).sum(d)


@cached
def _map(dim: Dim, i: int, m: int, scale: float | None, way: Way) -> Taps:
    """The map of rows for the rank with shard i."""
    return _alone(lambda: _mapped(dim, i, m, scale, way))


def _mapped(dim: Dim, i: int, m: int, scale: float | None, way: Way) -> Taps:
    rows, weights = _taps(dim.size, m, scale, way)
    edges = [round(o * m / dim.size) for o in dim.offsets]
    windows = [
        (int(rows[:, a:b].min()), int(rows[:, a:b].max()) + 1) if a < b else (0, 0)
        for a, b in pairwise(edges)
    ]
    a, b = edges[i], edges[i + 1]
    index = rows[:, a:b] - windows[i][0]
    return Taps(
        reach_of(dim, edges, windows),
        index.to(way.device),
        None if way.nearest else weights[:, a:b].to(way.device),
    )


def _run(
    signals: Tensor, m: int, scale: float | None, way: Way, by: int = 2, to: int = 2
) -> Tensor:
    """(k, n) to (k, m), by torch's kernel for as many dims: not all round alike.

    by, to: the sizes of the other dims, of which the middle is looked at.
    """
    others = way.spatial - 1
    volume = signals.to(way.device).view([signals.shape[0], 1, -1, *[1] * others])
    volume = volume.expand(-1, 1, -1, *[by] * others).contiguous()
    found = _kernel(volume, [m, *[to] * others], [scale, *[None] * others], way)
    found = found.flatten(2).view(signals.shape[0], m, -1)
    return found[..., found.shape[-1] // 2].cpu()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of torch's coordinates: that of the data, of halves single."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _sources(n: int, m: int, scale: float | None, way: Way) -> Tensor:
    """The input row that nearest takes for each output row."""
    return _run(torch.arange(n, dtype=_wide(way.dtype))[None], m, scale, way)[0].round().long()


def _taps(n: int, m: int, scale: float | None, way: Way) -> tuple[Tensor, Tensor]:
    """Output row j is the sum over t of weights[t, j] times input row rows[t, j].

    Torch interpolates the indicators of the rows congruent to 0, 1, ... modulo a number larger than
    its reach; around the place where row j must read, they tell the weights. Infinite ones tell
    which rows it reads: zero times infinity is NaN.
    """
    if way.nearest:
        return _sources(n, m, scale, way)[None], torch.ones(1, m)
    step = n / m if scale is None else 1 / scale
    if way.align:
        step = (n - 1) / (m - 1) if m > 1 else 0.0
    stretch = max(1.0, step) if way.antialias else 1.0
    reach = ceil((2 if way.mode == "bicubic" else 1) * stretch) + 1
    period = 2 * reach + 2
    at = torch.arange(m, dtype=torch.float64)
    # torch's antialiasing has corners tell the step alone
    corners = way.align and not way.antialias
    centre = at * step if corners else (at + 0.5) * step - 0.5
    low = (centre.floor().long() - reach).clamp(min=0, max=max(0, n - 1))
    marks = (torch.arange(n)[None] % period == torch.arange(period)[:, None]).to(_wide(way.dtype))
    rows = low + torch.arange(period)[:, None]
    inside = rows < n
    weights = torch.where(inside, _run(marks, m, scale, way).gather(0, rows % period), 0)
    large = torch.where(marks > 0, torch.inf, 0.0)
    # from four to three: of the middle no weight is zero
    large = torch.where(inside, _run(large, m, scale, way, 4, 3).gather(0, rows % period), 0)
    # what is read twice, once times zero, is one tap more
    twice = large.isnan() & (weights != 0)
    return _packed(
        torch.cat((rows, rows)),
        torch.cat((weights, torch.zeros_like(weights))),
        torch.cat((~large.isfinite(), twice)),
    )


def _packed(rows: Tensor, weights: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """As many used taps of each output row: one in several parts, where it has fewer."""
    order = used.to(torch.int8).sort(stable=True, dim=0, descending=True)[1]
    order = order[: int(used.sum(0).max())]
    rows, weights = rows.gather(0, order), weights.gather(0, order)
    lacks = ~used.gather(0, order)
    weights = weights.masked_fill(lacks, 0)
    main = weights.abs().argmax(0, keepdim=True)
    parts = lacks | (torch.arange(len(rows))[:, None] == main)
    share = weights.gather(0, main) / parts.sum(0)
    return torch.where(parts, rows.gather(0, main), rows), torch.where(parts, share, weights)
