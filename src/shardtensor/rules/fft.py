"""Discrete Fourier transforms: local along whole dims, all-to-alls between sharded ones.

A transform over several dims does the whole ones first. Then the shards of each sharded one move
aside by one all-to-all, to a dim that is done if there is one, and stay there: fft2 of (H_sharded,
W) lies sharded along W, and ifft2 of that along H again. So a pair costs two all-to-alls, and any
reading of the result in other placements says so with `redistribute`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import cached
from ..dispatch.fallback import fall_back
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced, to_dims
from .empty import with_one
from .pointwise import function_rule
from .shape import _index, many, whole_in


class Kind(NamedTuple):
    """A family of transforms: `others` of all dims but the last one, `last` of that.

    first: whether `last` comes first. It does where it makes complex numbers of real ones.
    """

    others: Callable[..., Tensor]
    last: Callable[..., Tensor] | None = None
    first: bool = False


_fft = torch.fft
KINDS = {
    "fft": Kind(_fft.fftn),
    "ifft": Kind(_fft.ifftn),
    "rfft": Kind(_fft.fftn, _fft.rfft, True),
    "irfft": Kind(_fft.ifftn, _fft.irfft),
    "hfft": Kind(_fft.fftn, _fft.hfft),
    "ihfft": Kind(_fft.ifftn, _fft.ihfft, True),
}


class Transform(NamedTuple):
    """The arguments of one transform. lengths[i]: the length along dims[i], None the dim's own."""

    kind: Kind
    dims: tuple[int, ...]
    lengths: tuple[int | None, ...]
    norm: str | None


def _one(input: Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    return input, n if n is None else (n,), (dim,), norm


def _two(input: Tensor, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Any:
    return input, s, dim, norm


def _any(input: Tensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Any:
    return input, s, dim, norm


_ARGUMENTS = {"": _one, "2": _two, "n": _any}


@function_rule(*(f"fft_{kind}{n}" for kind in KINDS for n in ("", "2", "n")))
def fft(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All of torch.fft's transforms."""
    if "axis" in kwargs:
        kwargs["dim"] = kwargs.pop("axis")
    name = func.__name__.split(".")[0].removeprefix("fft_")
    count = name[-1] if name[-1] in "2n" else ""
    x, s, dim, norm = _ARGUMENTS[count](*args, **kwargs)
    if not isinstance(x, ShardTensor):
        return func(*args, **kwargs)
    given = None if s is None else tuple(many(s))
    if dim is None:
        first = 0 if given is None else x.ndim - len(given)
        dims = tuple(range(max(0, first), x.ndim))
    else:
        dims = tuple(_index(d, x.ndim) for d in many(dim))
    x = reduced(x)
    if not dims or not any(x._spec.dims[d].axes for d in dims):
        result = local_call(func, x, args[1:], kwargs, dims)
    elif any(all(n == 1 for i, n in enumerate(x.shape) if i != d) for d in dims):
        # nothing else could be sharded
        return fall_back(func, args, kwargs)
    else:
        _check(func, x, args[1:], kwargs)
        lengths = tuple(None if n == -1 else n for n in given or (-1,) * len(dims))
        result = transformed(x, Transform(KINDS[name.removesuffix(count)], dims, lengths, norm))
    return result


def local_call(
    func: Any, x: ShardTensor, args: Sequence[Any], kwargs: dict[str, Any], dims: Sequence[int]
) -> ShardTensor:
    """func of the local tensor along whole dims."""
    kwargs = {k: v for k, v in kwargs.items() if k != "input"}
    local = on_some(func, x._local, dims, *args, **kwargs)
    return wrap(local, _sizes(x._spec, local, dims))


def on_some(func: Any, local: Tensor, dims: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """func(local, ...) along dims. Torch refuses an empty batch; its rank gets an empty result."""
    if local.numel() or not all(local.shape[d] for d in dims):
        return func(local, *args, **kwargs)
    batch = [d for d in range(local.ndim) if d not in dims]
    out = func(with_one(local, batch, 0), *args, **kwargs)
    kept = [slice(None) if d in dims else slice(n) for d, n in enumerate(local.shape)]
    return out[tuple(kept)]


def _sizes(spec: Spec, local: Tensor, dims: Sequence[int]) -> Spec:
    """The spec of a local result whose whole `dims` may have new sizes."""
    return _resized(spec, tuple(dims), tuple(local.shape[d] for d in dims))


@cached
def _resized(spec: Spec, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Spec:
    return spec.replace({d: Dim(n) for d, n in zip(dims, sizes, strict=True)})


def _check(func: Any, x: ShardTensor, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise what torch raises for these arguments."""
    kwargs = {k: v for k, v in kwargs.items() if k != "input"}
    func(torch.empty(x.shape, dtype=x.dtype, device="meta"), *args, **kwargs)


def transformed(x: ShardTensor, job: Transform) -> ShardTensor:
    """A transform over dims of which some are sharded."""
    kind = job.kind
    if kind.last is None:
        return others(x, job, job.dims, ())
    *rest, last = job.dims
    if kind.first:
        y = _last(x, job, tuple(rest), ())
        return others(y, job, tuple(rest), (last,))
    return _last(others(x, job, tuple(rest), ()), job, (), tuple(rest))


def _last(
    x: ShardTensor, job: Transform, todo: tuple[int, ...], done: tuple[int, ...]
) -> ShardTensor:
    d = job.dims[-1]
    x = moved_off(x, d, todo, done)
    return local_call(job.kind.last, x, (job.lengths[-1], d, job.norm), {}, (d,))


def others(
    x: ShardTensor, job: Transform, todo: tuple[int, ...], done: tuple[int, ...]
) -> ShardTensor:
    """The complex transforms over `todo`: the whole dims first, then one sharded dim at a time."""
    while todo:
        now = tuple(d for d in todo if not x._spec.dims[d].axes)
        if not now:
            # inner mesh axes first, so that they may nest in outer ones
            d = max(todo, key=lambda d: x._spec.dims[d].axes)
            now = (d,)
            x = moved_off(x, d, tuple(e for e in todo if e != d), done)
        lengths = [job.lengths[job.dims.index(d)] for d in now]
        own = [x.shape[d] if n is None else n for d, n in zip(now, lengths, strict=True)]
        x = local_call(job.kind.others, x, (own, now, job.norm), {}, now)
        done += now
        todo = tuple(d for d in todo if d not in now)
    return x


def moved_off(x: ShardTensor, d: int, todo: tuple[int, ...], done: tuple[int, ...]) -> ShardTensor:
    """x with dim d whole, its shards moved to another dim."""
    for dims in _moves(x._spec, d, todo, done):
        x = to_dims(x, dims)
    return x


@cached
def _moves(
    spec: Spec, d: int, todo: tuple[int, ...], done: tuple[int, ...]
) -> tuple[tuple[Dim, ...], ...]:
    """The dims to pass through until dim d is whole."""
    dims = spec.dims
    axes = dims[d].axes
    if not axes:
        return ()
    free = [e for e, dim in enumerate(dims) if e != d and dim.size > 1]
    if not free:
        return (spec.whole_in([d]).dims,)

    def rank(e: int) -> tuple[Any, ...]:
        parts = prod(spec.mesh.size(a) for a in (*axes, *dims[e].axes))
        return dims[e].size >= parts, e not in todo, not dims[e].axes, e in done, dims[e].size

    to = max(free, key=rank)
    union = tuple(sorted((*axes, *dims[to].axes)))
    all_on_to = Dim.chunked(dims[to].size, union, spec.mesh)
    last = spec.replace({to: all_on_to, d: dims[d].whole}).dims
    if union[: len(dims[to].axes)] == dims[to].axes:
        return (last,)
    # outer axes cannot move below inner ones: all meet in dim d first
    all_on_d = Dim.chunked(dims[d].size, union, spec.mesh)
    return spec.replace({d: all_on_d, to: dims[to].whole}).dims, last


# complex numbers as pairs ------------------------------------------------------------------------


@rule("view_as_real")
def view_as_real(input: ShardTensor) -> ShardTensor:
    spec, x = input._spec, input._local
    # torch's gradient of an empty view fails on strides
    local = torch.view_as_real(x) if x.numel() else torch.stack((x.real, x.imag), -1)
    return wrap(local, spec.insert(input.ndim, Dim(2)))


@rule("view_as_complex")
def view_as_complex(input: ShardTensor) -> ShardTensor:
    if not input.ndim or input.shape[-1] != 2:
        raise RuntimeError("Tensor must have a last dimension of size 2")
    x = whole_in(input, [input.ndim - 1], "view_as_complex")
    return wrap(torch.view_as_complex(x._local), x._spec.drop([-1]))
