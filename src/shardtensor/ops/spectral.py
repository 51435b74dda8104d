"""Transforms that keep few modes, for spectral layers: only the kept modes are sent.

`truncated_rfftn` is rfftn followed by slices, `truncated_irfftn` their adjoint's pattern: modes put
into zeros, then irfftn. On plain tensors they are just that. Along a sharded dim each rank
sums its own rows' part of the kept modes, a product with a small matrix, and the parts are added
(a reduce-scatter); back, each rank makes its own rows of gathered modes. The whole spectrum is
never made, nor sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import comm
from ..rules.fourier.modes import everywhere
from ..rules.fourier.transforms import on_some
from ..rules.fourier.waves import modes_of, real_rows_of, rows_of
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced, to_dims

Modes = int | tuple[int, int]


def truncated_rfftn(
    x: Tensor, modes: Sequence[Modes], dim: Sequence[int] | None = None, norm: str | None = None
) -> Tensor:
    """Some modes of torch.fft.rfftn(x, dim=dim, norm=norm), the positive frequencies first.

    modes: for each of `dim` (the last ones by default) how many non-negative and negative
    frequencies to keep; an integer keeps as many of both, so 2 m in all. For the last of `dim`, an
    integer: the frequencies 0 to m - 1. For each sharded dim the modes that are kept are sent
    alone, once. Raises ValueError for modes that do not fit.
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

    y: (..., *modes), as `truncated_rfftn` gives it. like: a ShardTensor in whose sharding the
    result is wanted along `dim` (and along other dims of the same size); else it is as
    torch.fft.irfftn leaves it. Modes are sent as by `truncated_rfftn`. Raises ValueError for
    lengths, modes or a `like` that do not fit.
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
    if dim is not None and not all(-ndim <= d < ndim for d in dim):
        raise ValueError(f"modes in dims {tuple(dim)} of a tensor of {ndim} dims")
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
        return _summed(x, d, above, below, norm)
    y = (torch.fft.rfft if real else torch.fft.fft)(x, dim=d, norm=norm)
    ends = [y.narrow(d, 0, above), y.narrow(d, y.shape[d] - below, below)]
    return torch.cat(ends, d) if below else ends[0]


def _summed(x: ShardTensor, d: int, above: int, below: int, norm: str | None) -> ShardTensor:
    """Kept modes of a sharded dim, still sharded there: sums of every rank's own rows' part."""
    spec, freqs = x._spec, (*range(above), *range(-below, 0))
    dim = spec.dims[d]
    part = modes_of(x._local, d, freqs, spec.offset[d], dim.size, norm, -1)
    own = Dim.chunked(len(freqs), dim.axes, spec.mesh)
    local = comm.reduce_scatter(part, d, own.sizes, comm.along(spec, d))
    return wrap(local, spec.replace({d: own}))


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
    local = everywhere(y, dims, target)
    # a complex dim gets its own rows as soon as possible: the sharded ones cost least
    for d in sorted(dims[:-1], key=lambda d: d not in sharded):
        above, below = few[d]
        if d in sharded:
            freqs = (*range(above), *range(-below, 0))
            local = rows_of(local, d, freqs, target.spans[d], shape[d], norm, 1)
        else:
            local = on_some(
                torch.fft.ifft, _spread(local, d, above, below, shape[d]), (d,), dim=d, norm=norm
            )
    d = dims[-1]
    if d not in sharded:
        return wrap(on_some(torch.fft.irfft, local, (d,), n=shape[d], dim=d, norm=norm), target)
    freqs = tuple(range(few[d][0]))
    return wrap(real_rows_of(local, d, freqs, target.spans[d], shape[d], norm), target)


def _target(like: Spec, dims: Sequence[int], shape: torch.Size) -> list[Dim]:
    if len(like.dims) != len(shape) or any(like.shape[d] != shape[d] for d in dims):
        raise ValueError(f"truncated_irfftn: a result of shape {tuple(shape)} like {like}")
    return [e if e.size == n else Dim(n) for e, n in zip(like.dims, shape, strict=True)]
