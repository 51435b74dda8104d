"""Dropout, random fills and *_like draws; see `shardtensor.random` for which numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..dispatch.fallback import gathered
from ..dispatch.writes import check_writable
from ..errors import UnsupportedOpError
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.random import draw, generator_for, matching, memory_order, refill
from ..tensor.recut import aside
from ..tensor.redistribute import fit, reduced, replicate
from ..tensor.tape import tape
from .agreed import agreed
from .pointwise import align, function_rule

_PROBABLE = "Expected p_in >= 0 && p_in <= 1"


def _keep(x: ShardTensor, dims: tuple[Dim, ...], p: float) -> Tensor:
    """Ones, with probability 1 - p, and zeros, with the given dims and the dtype of x."""
    spec = x._spec.with_dims(dims)
    # one number for each channel is drawn rows first, even where that is one for each element
    order = _order(x) if dims is x._spec.dims else ()
    return draw(spec, x.dtype, x.device, lambda t, g: t.bernoulli_(1 - p, generator=g), order=order)


def _order(x: ShardTensor, memory_format: Any = torch.preserve_format) -> tuple[int, ...]:
    """The dims of what empty_like makes of x on one device, in memory."""
    if not matching() or memory_format is torch.contiguous_format:
        return ()
    if memory_format is torch.preserve_format:
        return memory_order(x)
    # channels last
    return (0, *range(2, x.ndim), 1)


def _check(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name} probability has to be between 0 and 1, but got {p}")


def _check_all(spec: Spec, right: Callable[[], Tensor], what: str) -> None:
    """Raise on every rank where parameters of a distribution are wrong on one, as torch on CPUs."""

    def check() -> None:
        if not right().all():
            raise RuntimeError(what)

    group = comm.group(spec.mesh, spec.varying)
    if tape() is not None:
        # the graph has no Python to raise
        wrong = comm.reduce(right().logical_not().any().to(torch.int64), group, "max")
        torch._assert_async(wrong == 0, what)
    elif spec.mesh.device_type == "cpu" and comm.knows_values(group):
        agreed(check, spec, spec.varying, RuntimeError, what)


@rule("dropout")
def dropout(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    _check("dropout", p)
    if not train or p == 0:
        return input
    return _drop(input, input._spec.dims, p)


@rule("feature_dropout")
def feature_dropout(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    """Whole channels (dim 1) are dropped, alike on all shards of the dims after it."""
    _check("dropout", p)
    if not train or p == 0:
        return input
    return _drop(input, _channels(input), p)


def _channels(x: ShardTensor) -> tuple[Dim, ...]:
    if x.ndim < 2:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return x._spec.replace(dict.fromkeys(range(2, x.ndim), Dim(1))).dims


def _drop(x: ShardTensor, dims: tuple[Dim, ...], p: float) -> ShardTensor:
    x = reduced(x)
    if p == 1:
        return wrap(x._local * 0, x._spec)
    return wrap(x._local * _keep(x, dims, p).div_(1 - p), x._spec)


@rule("dropout_")
def dropout_(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    _check("dropout", p)
    return _drop_in_place(input, input._spec.dims, p, "dropout_") if train and p > 0 else input


@rule("feature_dropout_")
def feature_dropout_(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    _check("dropout", p)
    if not train or p == 0:
        return input
    return _drop_in_place(input, _channels(input), p, "feature_dropout_")


def _drop_in_place(x: ShardTensor, dims: tuple[Dim, ...], p: float, name: str) -> ShardTensor:
    check_writable(x, name)
    x._local.mul_(_keep(x, dims, p).div_(1 - p) if p < 1 else 0.0)
    return x


@rule("alpha_dropout")
def alpha_dropout(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    """Dropout to the negative saturation value of SELU (Klambauer et al. 2017, section 3)."""
    return _alpha(input, input._spec.dims, p, train)


@rule("feature_alpha_dropout")
def feature_alpha_dropout(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    dims = _channels(input) if train and p > 0 else input._spec.dims
    return _alpha(input, dims, p, train)


def _alpha(x: ShardTensor, dims: tuple[Dim, ...], p: float, train: bool) -> ShardTensor:
    _check("dropout", p)
    if not train or p == 0:
        return x
    x = reduced(x)
    if p == 1:
        return wrap(x._local * 0, x._spec)
    keep = _keep(x, dims, p)
    alpha = 1.7580993408473766
    a = 1 / ((alpha**2 * p + 1) * (1 - p)) ** 0.5
    shift = (keep - 1) * (alpha * a) + alpha * a * p
    return wrap(x._local * (keep * a) + shift, x._spec)


@rule("rand_like")
def rand_like(input: ShardTensor, **options: Any) -> ShardTensor:
    return _like(input, lambda t, g: t.uniform_(generator=g), **options)


@rule("randn_like")
def randn_like(input: ShardTensor, **options: Any) -> ShardTensor:
    return _like(input, lambda t, g: t.normal_(generator=g), normal=True, **options)


@rule("randint_like")
def randint_like(input: ShardTensor, *bounds: int, **options: Any) -> ShardTensor:
    known = [options.pop(k) for k in ("low", "high") if k in options]
    low, high = (0, *bounds, *known)[-2:]
    return _like(input, lambda t, g: t.random_(low, high, generator=g), **options)


def _like(
    x: ShardTensor,
    fill: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    generator: Any = None,
    requires_grad: bool = False,
    normal: bool = False,
    memory_format: Any = torch.preserve_format,
    **unused: Any,
) -> ShardTensor:
    """unused: layout and pin_memory, which change no number."""
    spec, place = x._spec.cotangent, torch.device(device or x.device)
    order = _order(x, memory_format)
    local = draw(spec, dtype or x.dtype, place, fill, generator, normal=normal, order=order)
    if memory_format is not torch.preserve_format:
        local = local.contiguous(memory_format=memory_format)
    elif not x._local.is_contiguous():
        local = torch.empty_like(x._local, dtype=local.dtype, device=place).copy_(local)
    # torch.func lets nobody ask
    return wrap(local.requires_grad_() if requires_grad else local, spec)


@function_rule(
    "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "log_normal_",
    "geometric_",
)  # fmt: skip
def fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    """Each shard draws from a stream of its own, equal on its replicas."""
    x = args[0]
    if not isinstance(x, ShardTensor):
        raise UnsupportedOpError(f"{func.__name__} of a plain tensor with a ShardTensor argument")
    check_writable(x, func.__name__)
    generator = kwargs.pop("generator", None)
    rest = [a._local if isinstance(a, ShardTensor) and a._spec == x._spec else a for a in args[1:]]
    for a, given in zip(rest, args[1:], strict=True):
        if a is given and isinstance(a, Tensor) and (a.ndim or isinstance(a, ShardTensor)):
            raise UnsupportedOpError(f"{func.__name__} with parameters {a.shape}: shard them alike")
    if func.__name__.split(".")[0] == "bernoulli_" and rest and isinstance(rest[0], Tensor):
        _check_all(x._spec, lambda: (rest[0] >= 0) & (rest[0] <= 1), _PROBABLE)
    if matching() and not any(isinstance(a, Tensor) for a in rest):
        normal = func.__name__.split(".")[0] == "normal_"
        x._local.copy_(
            draw(x._spec, x.dtype, x.device, lambda t, g: func(t, *rest, **kwargs, generator=g),
                 generator, normal=normal, order=_order(x))
        )  # fmt: skip
    elif any(isinstance(a, Tensor) for a in rest):
        func(x._local, *rest, **kwargs, generator=generator_for(x._spec, x.device, generator))
    else:
        refill(x._local, x._spec, lambda t, g: func(t, *rest, **kwargs, generator=g), generator)
    return x


@rule("bernoulli")
def bernoulli(
    input: ShardTensor, p: float | None = None, *, generator: torch.Generator | None = None
) -> ShardTensor:
    x = reduced(input)
    if p is None:
        _check_all(x._spec, lambda: (x._local >= 0) & (x._local <= 1), _PROBABLE)
    dtype = torch.float64 if p is not None or x.dtype is torch.float64 else torch.float32
    u = draw(x._spec, dtype, x.device, lambda t, g: t.uniform_(generator=g), generator)
    return wrap((u < (x._local if p is None else p)).to(x.dtype), x._spec)


@rule("normal")
def normal(
    mean: Tensor | float, std: Tensor | float = 1.0, *, generator: torch.Generator | None = None
) -> ShardTensor:
    given = [v for v in (mean, std) if isinstance(v, Tensor)]
    spec, wanted = align(*given)
    first, values = given[0], fit(spec.mesh, spec.varying, *zip(given, wanted, strict=True))
    local: Any = iter(values)
    mu, sigma = (next(local) if isinstance(v, Tensor) else v for v in (mean, std))
    own = 1.0 if isinstance(std, Tensor) else std
    if isinstance(sigma, Tensor):
        _check_all(spec, lambda: sigma.ge(0), "normal expects all elements of std >= 0.0")
    drawn = draw(
        spec, first.dtype, first.device, lambda t, g: t.normal_(0.0, own, generator=g), generator,
        normal=True,
    )  # fmt: skip
    drawn = drawn.mul_(sigma.detach()) if isinstance(sigma, Tensor) else drawn
    drawn = drawn.add_(mu.detach() if isinstance(mu, Tensor) else mu)
    for x in (mu, sigma):
        if isinstance(x, Tensor) and x.requires_grad:
            # as in torch, their gradients are zeros
            drawn = torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, drawn)
    return wrap(drawn, spec)


@rule("rrelu")
def rrelu(
    input: ShardTensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Slopes of negative elements: drawn in training, the mean of the bounds otherwise."""
    if not training:
        return torch.nn.functional.leaky_relu(input, (lower + upper) / 2)
    if matching():
        return gathered(torch.rrelu, (input, lower, upper, True))
    x = reduced(input)
    drawn = draw(x._spec, x.dtype, x.device, lambda t, g: t.uniform_(generator=g), generator)
    slope = lower + (upper - lower) * drawn
    return wrap(torch.where(x._local > 0, x._local, slope * x._local), x._spec)


@rule("rrelu_")
def rrelu_(input: ShardTensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.copy_(rrelu(input, *args, **kwargs))


@rule("multinomial")
def multinomial(
    input: ShardTensor,
    num_samples: int,
    replacement: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> ShardTensor:
    """Categories (the last dim) are brought together; rows stay sharded."""
    if matching():
        options = {"generator": generator}
        return gathered(torch.multinomial, (input, num_samples, replacement), options)
    x = aside(reduced(input), [input.ndim - 1])
    x = replicate(input) if x is None else x
    spec = x._spec.replace({-1: Dim(num_samples)})
    g = generator_for(spec, x.device, generator)
    drawn = agreed(
        lambda: torch.multinomial(x._local, num_samples, replacement, generator=g), x._spec,
        x._spec.varying, RuntimeError,
        "invalid multinomial distribution in the rows of {0} other ranks, the first number {1}",
    )  # fmt: skip
    return wrap(drawn, spec)
