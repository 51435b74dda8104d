"""Transforms that keep few modes, for spectral layers: only the kept modes are sent.

`truncated_rfftn` is rfftn followed by slices, `truncated_irfftn` their adjoint's pattern: modes put
into zeros, then irfftn. On plain tensors they are just that. Along a sharded dim each rank
sums its own rows' part of the kept modes, a product with a small matrix, and the parts are added
(a reduce-scatter); back, each rank makes its own rows of gathered modes. The whole spectrum is
never made, nor sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch, comm
from ..cache import cached
from ..comm.exchanges import whole
from ..cuts import cut
from ..rules.fft import on_some
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import fit, reduced, to_dims

Modes = int | tuple[int, int]


def truncated_rfftn(
    x: Tensor, modes: Sequence[Modes], dim: Sequence[int] | None = None, norm: str | None = None
) -> Tensor:
    """Some modes of torch.fft.rfftn(x, dim=dim, norm=norm), the positive frequencies first.

    modes: for each of `dim` (the last ones by default) how many non-negative and negative
    frequencies to keep; an integer keeps as many of both, so 2 m in all. For the last of `dim`, an
    integer: the frequencies 0 to m - 1.
    """
    dims, kept = _arguments(x.ndim, modes, dim)
    for d, (above, below) in zip(dims, kept, strict=True):
        _check(x.shape[d], above, below, d == dims[-1])
    x = reduced(x)
    y = _kept(x, dims[-1], *kept[-1], norm, True)
    # what is whole shrinks before anything moves
    order = sorted(range(len(dims) - 1), key=lambda i: bool(_parts(x, dims[i])))
    for i in order:
        y = _kept(y, dims[i], *kept[i], norm, False)
    return y


def truncated_irfftn(
    y: Tensor,
    modes: Sequence[Modes],
    s: Sequence[int],
    dim: Sequence[int] | None = None,
    norm: str | None = None,
    *,
    like: Tensor | None = None,
) -> Tensor:
    """The inverse for the modes that `truncated_rfftn` kept, all others zero, with lengths `s`.

    like: a ShardTensor in whose sharding the result is wanted along `dim` (and along other dims of
    the same size); else it is as torch.fft.irfftn leaves it.
    """
    dims, kept = _arguments(y.ndim, modes, dim)
    if len(s) != len(dims):
        raise ValueError(f"truncated_irfftn: {len(s)} lengths for {len(dims)} dims")
    for d, n, (above, below) in zip(dims, s, kept, strict=True):
        _check(n, above, below, d == dims[-1])
        if y.shape[d] != above + below:
            raise ValueError(
                f"truncated_irfftn: dim {d} of {tuple(y.shape)}: {above + below} modes"
            )
    if isinstance(like, ShardTensor):
        lengths = dict(zip(dims, s, strict=True))
        shape = [lengths.get(d, n) for d, n in enumerate(y.shape)]
        return _shared(y, kept, dims, norm, like._spec, torch.Size(shape))
    return _inverse(y, kept, s, dims, norm)


def _arguments(
    ndim: int, modes: Sequence[Modes], dim: Sequence[int] | None
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    dims = tuple(range(ndim - len(modes), ndim) if dim is None else (d % ndim for d in dim))
    if len(dims) != len(modes) or len(set(dims)) != len(dims):
        raise ValueError(f"{len(modes)} numbers of modes for dims {dims}")
    *rest, last = modes
    if not isinstance(last, int):
        raise ValueError(f"modes {last} of the last dim: it has no negative frequencies")
    return dims, [*((m, m) if isinstance(m, int) else m for m in rest), (last, 0)]


def _check(n: int, above: int, below: int, half: bool) -> None:
    most = n // 2 + 1 if half else n
    if min(above, below) < 0 or not 0 < above + below <= most:
        raise ValueError(f"{above} + {below} modes of {most}")


def _parts(x: Tensor, d: int) -> int:
    """How many shards a dim has; 0 if it is whole."""
    return len(x._spec.dims[d].sizes) if isinstance(x, ShardTensor) else 0


# forward -----------------------------------------------------------------------------------------


def _kept(x: Tensor, d: int, above: int, below: int, norm: str | None, real: bool) -> Tensor:
    n = x.shape[d]
    if isinstance(x, ShardTensor) and _parts(x, d) > 1 and (above + below) * _parts(x, d) < n:
        return _summed(x, d, above, below, norm, real)
    y = (torch.fft.rfft if real else torch.fft.fft)(x, dim=d, norm=norm)
    ends = [y.narrow(d, 0, above), y.narrow(d, y.shape[d] - below, below)]
    return torch.cat(ends, d) if below else ends[0]


def _summed(
    x: ShardTensor, d: int, above: int, below: int, norm: str | None, real: bool
) -> ShardTensor:
    """Kept modes of a sharded dim, still sharded there: sums of every rank's own rows' part."""
    spec = x._spec
    dim, rows = spec.dims[d], x._local.movedim(d, -1)
    freqs = (*range(above), *range(-below, 0))
    scale = _scale(dim.size, norm, -1)
    matrix = _waves(freqs, spec.offset[d], rows.shape[-1], dim.size, -1, rows) * scale
    with torch.autocast(x.device.type, enabled=False):
        if real:
            # (rows, modes) complex as (rows, 2 modes) real
            part = rows @ torch.view_as_real(matrix.mT.contiguous()).flatten(1)
            part = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
        else:
            part = rows @ matrix.mT
    part = part.movedim(-1, d).contiguous()
    own = Dim.chunked(len(freqs), dim.axes, spec.mesh)
    local = comm.reduce_scatter(part, d, own.sizes, comm.along(spec, d))
    return wrap(local, spec.replace({d: own}))


def _waves(
    freqs: tuple[int, ...], start: int, rows: int, n: int, sign: int, like: Tensor
) -> Tensor:
    """exp(sign 2 pi i k j / n) for frequencies k and rows j = start, start + 1, ...: (k, j)."""
    make = _waves_of if _torch.is_tracing() else _kept_waves
    return make(freqs, start, rows, n, sign, like.dtype, like.device)


def _waves_of(
    freqs: tuple[int, ...], start: int, rows: int, n: int, sign: int, dtype: Any, device: Any
) -> Tensor:
    # kept waves must serve in training though first made for inference
    with torch.inference_mode(False), torch.no_grad():
        k = torch.tensor(freqs, device=device)
        j = torch.arange(start, start + rows, device=device)
        # whole turns taken off as integers: the angle is exact to the last digit
        angle = (k[:, None] * j % n).double() * (sign * 2 * math.pi / n)
        wave = torch.complex(angle.cos(), angle.sin())
        return wave.to(dtype if dtype.is_complex else dtype.to_complex())


_kept_waves = cached(_waves_of)


def _scale(n: int, norm: str | None, sign: int) -> float:
    if norm == "ortho":
        return 1 / math.sqrt(n)
    if norm not in (None, "forward", "backward"):
        raise RuntimeError(f"Invalid normalization mode: {norm!r}")
    return 1 / n if (norm == "forward") == (sign < 0) else 1.0


# inverse -----------------------------------------------------------------------------------------


def _inverse(
    y: Tensor,
    kept: Sequence[tuple[int, int]],
    s: Sequence[int],
    dims: Sequence[int],
    norm: str | None,
) -> Tensor:
    for d, n, (above, below) in zip(dims[:-1], s, kept, strict=False):
        y = torch.fft.ifft(_spread(y, d, above, below, n), dim=d, norm=norm)
    return torch.fft.irfft(y, n=s[-1], dim=dims[-1], norm=norm)


def _spread(y: Tensor, d: int, above: int, below: int, n: int) -> Tensor:
    """Kept modes among zeros."""
    if above + below == n:
        return y
    shape = [n - above - below if i == d else m for i, m in enumerate(y.shape)]
    zeros = torch.zeros(shape, dtype=y.dtype, device=y.device)
    return torch.cat([y.narrow(d, 0, above), zeros, y.narrow(d, above, below)], d)


def _shared(
    y: Tensor,
    kept: Sequence[tuple[int, int]],
    dims: tuple[int, ...],
    norm: str | None,
    like: Spec,
    shape: torch.Size,
) -> Tensor:
    """The inverse sharded as `like`: every rank makes its own rows from all kept modes."""
    target = like.with_dims(_target(like, dims, shape))
    s = [shape[d] for d in dims]
    sharded = [d for d in dims if target.dims[d].is_cut]
    few = dict(zip(dims, kept, strict=True))
    if not sharded or any(sum(few[d]) * len(target.dims[d].sizes) >= shape[d] for d in sharded):
        result = _inverse(y, kept, s, dims, norm)
        if not isinstance(result, ShardTensor):
            result = wrap(result, target.replicated())
        return to_dims(result, target.dims)
    local = _everywhere(y, dims, target)
    # a complex dim gets its own rows as soon as possible: the sharded ones cost least
    for d in sorted(dims[:-1], key=lambda d: d not in sharded):
        above, below = few[d]
        if d in sharded:
            freqs = (*range(above), *range(-below, 0))
            n, rows = shape[d], target.local_shape[d]
            waves = _waves(freqs, target.offset[d], rows, n, 1, local) * _scale(n, norm, 1)
            local = (local.movedim(d, -1) @ waves).movedim(-1, d)
        else:
            local = on_some(
                torch.fft.ifft, _spread(local, d, above, below, shape[d]), (d,), dim=d, norm=norm
            )
    d = dims[-1]
    if d not in sharded:
        return wrap(on_some(torch.fft.irfft, local, (d,), n=shape[d], dim=d, norm=norm), target)
    # a real field counts every mode twice, but for the mean and the last of an even length
    n, m = shape[d], few[d][0]
    once = [1.0 if 2 * k in (0, n) else 2.0 for k in range(m)]
    twice = torch.tensor(once, dtype=torch.float64, device=local.device)
    waves = _waves(tuple(range(m)), target.offset[d], target.local_shape[d], n, 1, local)
    waves = waves * (twice[:, None] * _scale(n, norm, 1)).to(waves.dtype)
    modes = local.movedim(d, -1)
    with torch.autocast(local.device.type, enabled=False):
        real = modes.real @ waves.real - modes.imag @ waves.imag
    return wrap(real.movedim(-1, d), target)


def _target(like: Spec, dims: Sequence[int], shape: torch.Size) -> list[Dim]:
    if len(like.dims) != len(shape) or any(like.shape[d] != shape[d] for d in dims):
        raise ValueError(f"truncated_irfftn: a result of shape {tuple(shape)} like {like}")
    return [e if e.size == n else Dim(n) for e, n in zip(like.dims, shape, strict=True)]


def _everywhere(y: Tensor, dims: Sequence[int], target: Spec) -> Tensor:
    """All kept modes on every rank that needs them, for use that differs from rank to rank."""
    wanted = [Dim(y.shape[i]) if i in dims else e for i, e in enumerate(target.dims)]
    y = reduced(y)
    if not isinstance(y, ShardTensor) or not _ready(y._spec, wanted, dims, target):
        (found,) = fit(target.mesh, target.varying, (y, wanted))
        return found
    local = y._local
    for d in dims:
        e = y._spec.dims[d]
        if e.axes:
            # not a gather: the adjoint adds up what every rank made of the modes
            group = comm.group(target.mesh, e.axes)
            local = comm.window(local, d, e.sizes, whole(cut(e.sizes)), group)
    return local


def _ready(have: Spec, wanted: Sequence[Dim], dims: Sequence[int], target: Spec) -> bool:
    """Whether modes only need to be spread over the axes that shard them already."""
    rest = all(i in dims or e == w for i, (e, w) in enumerate(zip(have.dims, wanted, strict=True)))
    return rest and have.mesh == target.mesh and have.varying == target.varying
