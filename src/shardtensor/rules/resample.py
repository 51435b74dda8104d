"""F.interpolate over sharded dims: a linear map of rows, whose weights torch itself tells.

Whole-number upsampling runs torch's kernel on a window with a halo and drops the halo's outputs. In
all other cases each output row of a sharded dim is a sum of a few input rows; their indices
and weights are read off torch's own interpolation of small test signals, so every mode, scale and
rounding is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, floor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import comm
from ..cache import cached
from ..errors import UnsupportedOpError
from ..redistribute import reduced
from ..registry import rule
from ..spec import Dim
from ..tensor import ShardTensor, wrap

_LINEAR = ("linear", "bilinear", "trilinear")
_HALO = {"nearest": 0, "nearest-exact": 0, **dict.fromkeys(_LINEAR, 1), "bicubic": 2}
_KERNELS: dict[tuple[str, int], Callable[..., Tensor]] = {
    ("nearest", 1): torch._C._nn.upsample_nearest1d,
    ("nearest", 2): torch._C._nn.upsample_nearest2d,
    ("nearest", 3): torch._C._nn.upsample_nearest3d,
    ("nearest-exact", 1): torch._C._nn._upsample_nearest_exact1d,
    ("nearest-exact", 2): torch._C._nn._upsample_nearest_exact2d,
    ("nearest-exact", 3): torch._C._nn._upsample_nearest_exact3d,
    ("linear", 1): torch._C._nn.upsample_linear1d,
    ("bilinear", 2): torch._C._nn.upsample_bilinear2d,
    ("trilinear", 3): torch._C._nn.upsample_trilinear3d,
    ("bicubic", 2): torch._C._nn.upsample_bicubic2d,
}
_ANTIALIASED: dict[str, Callable[..., Tensor]] = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
}
Scales = tuple[float | None, ...]


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
    x = reduced(input)
    n = x.ndim - 2
    out, scales = _sizes(x, n, size, scale_factor, recompute_scale_factor)
    if mode == "area":
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[n - 1]
        return pool(x, tuple(out))  # type: ignore[arg-type]
    if (mode, n) not in _KERNELS:
        raise NotImplementedError(f"interpolate: mode {mode} for a tensor of {x.ndim} dims")
    if antialias and mode not in _ANTIALIASED:
        raise ValueError("Anti-alias option is restricted to bilinear and bicubic modes")
    align = bool(align_corners)
    sharded = [d for d in range(2, x.ndim) if x._spec.dims[d].axes]
    local, dims = x._local, list(x._spec.dims)
    if sharded and not align and not antialias and _is_multiple(x, out, scales, mode, sharded):
        return _upsampled(x, out, scales, mode, sharded)
    for d in sharded:
        way = (mode, align, antialias)
        local, dims[d] = _rows(local, x, d, out[d - 2], scales[d - 2], way)
    rest = [None if d + 2 in sharded else s for d, s in enumerate(scales)]
    target = [local.shape[d + 2] if d + 2 in sharded else m for d, m in enumerate(out)]
    if len(sharded) < n:
        # torch 2.13 antialiases a single column wrongly: a shard of one runs as two
        single = antialias and local.shape[-1] == 1 < x.shape[-1]
        if single:
            local, target[-1] = local.expand(*local.shape[:-1], 2), 2
        local = _kernel(local, target, rest, mode, align, antialias)
        local = local.narrow(-1, 0, 1) if single else local
    for d in range(2, x.ndim):
        if d not in sharded:
            dims[d] = Dim(out[d - 2])
    return wrap(local, x._spec.with_dims(dims))


def _sizes(
    x: ShardTensor, n: int, size: Any, scale_factor: Any, recompute: bool | None
) -> tuple[list[int], Scales]:
    """(output sizes, the scale factors that the coordinates use; None: the ratio of sizes)."""
    if (size is None) == (scale_factor is None):
        raise ValueError("either size or scale_factor should be defined, and not both")
    if size is not None:
        out = [int(m) for m in size] if isinstance(size, list | tuple) else [int(size)] * n
        return out, (None,) * n
    factors = (
        [float(s) for s in scale_factor]
        if isinstance(scale_factor, list | tuple)
        else [float(scale_factor)] * n
    )
    out = [floor(float(m) * s) for m, s in zip(x.shape[2:], factors, strict=True)]
    return out, (None,) * n if recompute else tuple(factors)


def _kernel(
    local: Tensor, out: Sequence[int], scales: Sequence[float | None], mode: str, align: bool,
    antialias: bool,
) -> Tensor:  # fmt: skip
    """Torch's own kernel, which takes no tensor without elements."""
    if local.numel() == 0:
        return local.new_zeros([*local.shape[:2], *out]) + local.sum()
    if antialias:
        return _ANTIALIASED[mode](local, list(out), align, *scales)
    kernel = _KERNELS[mode, len(out)]
    if mode.startswith("nearest"):
        return kernel(local, list(out), *scales)
    return kernel(local, list(out), align, *scales)


# whole-number upsampling -------------------------------------------------------------------------


def _is_multiple(
    x: ShardTensor, out: Sequence[int], scales: Scales, mode: str, sharded: Sequence[int]
) -> bool:
    """Whether every row becomes the same whole number of rows, by torch's own rounding too."""
    for d in sharded:
        n, m, s = x.shape[d], out[d - 2], scales[d - 2]
        if n == 0 or m % n or (s is not None and s != m // n):
            return False
        if mode.startswith("nearest"):
            rows, _ = _taps(n, m, s, (mode, False, False), x.dtype)
            if not torch.equal(rows, torch.arange(m) // (m // n)):
                return False
    return True


def _upsampled(
    x: ShardTensor, out: Sequence[int], scales: Scales, mode: str, sharded: Sequence[int]
) -> ShardTensor:
    halo = _HALO[mode]
    local, dims = x._local, [*x._spec.dims[:2], *(Dim(m) for m in out)]
    target, crops = list(out), []
    for d in sharded:
        dim = x._spec.dims[d]
        times = out[d - 2] // dim.size
        windows = [
            (max(0, a - halo), min(dim.size, b + halo)) if a < b else (a, a)
            for a, b in pairwise(dim.offsets)
        ]
        group = comm.group(x._spec.mesh, dim.axes)
        local = comm.window(local, d, dim.sizes, windows, group)
        i = x._spec.index[d]
        target[d - 2] = local.shape[d] * times
        crops.append((d, (dim.offsets[i] - windows[i][0]) * times, dim.sizes[i] * times))
        dims[d] = Dim(dim.size * times, dim.axes, tuple(n * times for n in dim.sizes))
    local = _kernel(local, target, scales, mode, False, False)
    for d, start, rows in crops:
        if rows != local.shape[d]:
            local = local.narrow(d, start, rows)
    return wrap(local, x._spec.with_dims(dims))


# any other map of rows ---------------------------------------------------------------------------


def _rows(
    local: Tensor, x: ShardTensor, d: int, m: int, scale: float | None, way: tuple[str, bool, bool]
) -> tuple[Tensor, Dim]:
    """Dim d of the local tensor resampled to this rank's part of m rows."""
    dim = x._spec.dims[d]
    if 0 in (dim.size, m):
        raise UnsupportedOpError(f"interpolate of {x._spec} to {m} rows: a size is zero")
    lows, weights = _taps(dim.size, m, scale, way, x.dtype)
    edges = [round(o * m / dim.size) for o in dim.offsets]
    taps = weights.shape[0]
    windows = [
        (int(lows[a:b].min()), min(dim.size, int(lows[a:b].max()) + taps)) if a < b else (0, 0)
        for a, b in pairwise(edges)
    ]
    group = comm.group(x._spec.mesh, dim.axes)
    rows = comm.window(local, d, dim.sizes, windows, group)
    i = x._spec.index[d]
    a, b = edges[i], edges[i + 1]
    shape = [-1] + [1] * (local.ndim - 1 - d)
    total = None
    for t in range(taps):
        index = (lows[a:b] + t).clamp(max=dim.size - 1) - windows[i][0]
        part = rows.index_select(d, index.to(x.device))
        if way[0].startswith("nearest"):
            total = part
        else:
            part = part * weights[t, a:b].to(x.device).view(shape)
            total = part if total is None else total + part
    assert total is not None
    new = Dim(m, dim.axes, tuple(q - p for p, q in pairwise(edges)))
    return total.to(x.dtype), new


@cached
def _taps(
    n: int, m: int, scale: float | None, way: tuple[str, bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output row j is the sum over t of weights[t, j] times input row lows[j] + t.

    Torch interpolates a ramp, which tells where row j reads, and the indicators of the rows
    congruent to 0, 1, ... modulo a number larger than its reach, which tell the weights.
    """
    mode, align, antialias = way

    def run(signals: Tensor) -> Tensor:
        """(k, n) to (k, m), by torch; as a plane where the mode has no 1-D form."""
        kind = {"bilinear": "linear", "trilinear": "linear"}.get(mode, mode)
        if antialias or mode == "bicubic":
            plane = signals[:, None, :, None].expand(-1, 1, -1, 2).contiguous()
            plane_mode = "bicubic" if mode == "bicubic" else "bilinear"
            return _kernel(plane, [m, 2], [scale, None], plane_mode, align, antialias)[:, 0, :, 0]
        return _kernel(signals[None], [m], [scale], kind, align, False)[0]

    # torch computes coordinates in the precision of the data, of halves in single precision
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if mode.startswith("nearest"):
        source = run(torch.arange(n, dtype=wide)[None])[0]
        return source.round().long(), torch.ones(1, m)
    stretch = max(1.0, n / m if scale is None else 1 / scale) if antialias else 1.0
    reach = ceil((2 if mode == "bicubic" else 1) * stretch) + 1
    period = 2 * reach + 2
    step = (n - 1) / max(1, m - 1) if align else n / m if scale is None else 1 / scale
    at = torch.arange(m, dtype=torch.float64)
    centre = at * step if align else (at + 0.5) * step - 0.5
    low = (centre.floor().long() - reach).clamp(min=0, max=max(0, n - 1))
    marks = (torch.arange(n)[None] % period == torch.arange(period)[:, None]).to(wide)
    found = run(marks)
    weights = torch.stack([found.gather(0, ((low + t) % period)[None])[0] for t in range(period)])
    weights = torch.where(low + torch.arange(period)[:, None] < n, weights, 0)
    # start every row at its first weight that is not zero, and drop taps that nobody uses
    first = (weights != 0).to(torch.int64).argmax(0)
    shifted = torch.arange(period)[:, None] + first
    weights = torch.where(shifted < period, weights.gather(0, shifted.clamp(max=period - 1)), 0)
    used = int((weights != 0).any(1).nonzero().max()) + 1
    return low + first, weights[:used]
