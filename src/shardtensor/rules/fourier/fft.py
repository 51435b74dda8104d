"""Discrete Fourier transforms: local along whole dims, all-to-alls between sharded ones.

fft2 of (H_sharded, W) lies sharded along W, and ifft2 of that along H again. So a pair costs two
all-to-alls, and any reading of the result in other placements says so with `redistribute`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ..._torch import probe
from ...cache import cached
from ...dispatch.fallback import fall_back
from ...registry import rule
from ...spec import Dim
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import reduced
from ..operands import checked_dim, many, whole_in
from ..pointwise import function_rule
from .spectrum import begun
from .transforms import KINDS, Transform, local_call, transformed


def _one(input: Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    return input, n if n is None else (n,), (dim,), norm


def _two(input: Tensor, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Any:
    return input, s, dim, norm


def _any(input: Tensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Any:
    return input, s, dim, norm


_ARGUMENTS = {"": _one, "2": _two, "n": _any}


def arguments(func: Any, args: Any, kwargs: Any) -> tuple[str, Any, tuple[int, ...], Any, Any]:
    """Of a call of a transform: (its kind, the tensor, the dims, their lengths if given, norm)."""
    name = func.__name__.split(".")[0].removeprefix("fft_")
    count = name[-1] if name[-1] in "2n" else ""
    x, s, dim, norm = _ARGUMENTS[count](*args, **kwargs)
    given = None if s is None else tuple(many(s))
    if dim is None:
        first = 0 if given is None else x.ndim - len(given)
        dims = tuple(range(max(0, first), x.ndim))
    else:
        dims = tuple(checked_dim(d, x.ndim) for d in many(dim))
    return name.removesuffix(count), x, dims, given, norm


def job_of(name: str, dims: tuple[int, ...], given: Any, norm: str | None) -> Transform:
    lengths = tuple(None if n == -1 else n for n in given or (-1,) * len(dims))
    return Transform(KINDS[name], dims, lengths, norm)


@function_rule(*(f"fft_{kind}{n}" for kind in KINDS for n in ("", "2", "n")))
def fft(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All of torch.fft's transforms."""
    if "axis" in kwargs:
        kwargs["dim"] = kwargs.pop("axis")
    if not isinstance(args[0] if args else kwargs.get("input"), ShardTensor):
        return func(*args, **kwargs)
    name, x, dims, given, norm = arguments(func, args, kwargs)
    x = reduced(x)
    if not dims or not any(x._spec.dims[d].axes for d in dims):
        return local_call(func, x, args[1:], kwargs, dims)
    if any(all(n == 1 for i, n in enumerate(x.shape) if i != d) for d in dims):
        # nothing else could be sharded
        return fall_back(func, args, kwargs)
    x = _autocast(x)
    strides = check(func, x, args[1:], kwargs)
    job = job_of(name, dims, given, norm)
    spectrum = begun(x, job, strides)
    return layout.told(transformed(x, job), strides) if spectrum is None else spectrum


def _autocast(x: ShardTensor) -> ShardTensor:
    """x as autocast casts it for all transforms, which a check without memory does not show."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    made = torch.fft.fft(x._local.detach().new_zeros(2)).dtype
    return x.to(made if x.is_complex() else made.to_real())  # type: ignore[return-value]


def check(
    func: Any, x: ShardTensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[int, ...]:
    """The strides of the whole result. Raises what torch raises for these arguments."""
    given = tuple(tuple(a) if isinstance(a, list) else a for a in args)
    named = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in kwargs.items())
    lies = x.shape, layout.stride(x), x.dtype, x.device
    return _passes(func, lies, given, tuple(kv for kv in named if kv[0] != "input"))


@cached
def _passes(func: Any, lies: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    shape, strides, dtype, device = lies
    with _torch.outside_modes(), probe.fake_mode():
        x = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        return func(x, *args, **dict(kwargs)).stride()


# complex numbers as pairs ------------------------------------------------------------------------


@rule("view_as_real")
def view_as_real(input: ShardTensor) -> ShardTensor:
    return wrap(layout.real_view(input._local), input._spec.insert(input.ndim, Dim(2)))


@rule("view_as_complex")
def view_as_complex(input: ShardTensor) -> ShardTensor:
    if not input.ndim or input.shape[-1] != 2:
        raise RuntimeError("Tensor must have a last dimension of size 2")
    x = whole_in(input, [input.ndim - 1], "view_as_complex", True)
    return wrap(torch.view_as_complex(x._local), x._spec.drop([-1]))
