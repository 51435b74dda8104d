"""Random numbers: independent from shard to shard, equal on all replicas of a shard.

Every call takes one seed from torch's default CPU generator, whatever the shard sizes, so ranks
that seed alike stay in step, and a checkpoint's recomputation, which restores that generator,
draws the same numbers. The seed and the shard's number make the generator of the local draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..comm import wire
from ..errors import UnsupportedOpError
from ..redistribute import aside, fit, reduced, replicate
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..views import check_writable
from .pointwise import align, function_rule

# an odd constant spreads shard numbers over the seed's bits (Knuth's multiplicative hash)
_SPREAD = 0x9E3779B97F4A7C15


def generator_for(
    spec: Spec, device: torch.device, generator: torch.Generator | None = None
) -> torch.Generator:
    """The generator of this rank's shard for one draw of a tensor with this spec."""
    source = None if generator is None or generator.device.type != "cpu" else generator
    seed = torch.randint(2**62, (1,), generator=source)
    alike = tuple(a for a in range(spec.mesh.ndim) if a not in spec.varying)
    name = comm.group(spec.mesh, alike)
    if comm.size(name) > 1:
        # replicas may have seeded differently, and must draw the same
        (seed,) = wire.all_reduce([seed.to(device)], "max", name)
    number = 0
    for axis in spec.varying:
        number = number * spec.mesh.size(axis) + spec.coordinate[axis]
    made = torch.Generator(device)
    made.manual_seed((int(seed) + number * _SPREAD) % 2**63)
    return made


def _keep(x: ShardTensor, dims: tuple[Dim, ...], p: float) -> tuple[Tensor, Spec]:
    """A boolean tensor with the given dims, true with probability 1 - p."""
    spec = x._spec.with_dims(dims)
    g = generator_for(spec, x.device)
    return torch.rand(spec.local_shape, generator=g, device=x.device) >= p, spec


def _check(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name} probability has to be between 0 and 1, but got {p}")


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
    return tuple(d if i < 2 else Dim(1) for i, d in enumerate(x._spec.dims))


def _drop(x: ShardTensor, dims: tuple[Dim, ...], p: float) -> ShardTensor:
    x = reduced(x)
    keep, _ = _keep(x, dims, p)
    scale = 1 / (1 - p) if p < 1 else 0.0
    return wrap(x._local * keep * scale, x._spec)


@rule("dropout_", "feature_dropout_")
def dropout_(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    _check("dropout", p)
    if train and p > 0:
        check_writable(input, "dropout_")
        keep, _ = _keep(input, input._spec.dims, p)
        input._local.mul_(keep * (1 / (1 - p) if p < 1 else 0.0))
    return input


@rule("alpha_dropout")
def alpha_dropout(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    """Dropout to the negative saturation value of SELU (Klambauer et al. 2017, section 3)."""
    return _alpha(input, input._spec.dims, p, train)


@rule("feature_alpha_dropout")
def feature_alpha_dropout(input: ShardTensor, p: float, train: bool) -> ShardTensor:
    return _alpha(input, _channels(input), p, train)


def _alpha(x: ShardTensor, dims: tuple[Dim, ...], p: float, train: bool) -> ShardTensor:
    _check("dropout", p)
    if not train or p == 0:
        return x
    x = reduced(x)
    if p == 1:
        return wrap(x._local * 0, x._spec)
    keep, _ = _keep(x, dims, p)
    low = -1.7580993408473766
    a = ((1 - p) * (1 + p * low**2)) ** -0.5
    kept = x._local * keep + low * (~keep).to(x.dtype)
    return wrap(a * kept - a * p * low, x._spec)


@function_rule("rand_like", "randn_like", "randint_like")
def like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    x = args[0] if args else kwargs.pop("input")
    spec = x._spec.cotangent
    device = torch.device(kwargs.get("device") or x.device)
    g = generator_for(spec, device, kwargs.pop("generator", None))
    dtype = kwargs.pop("dtype", None) or x.dtype
    kwargs["device"] = device
    make: dict[str, Callable[..., Tensor]] = {
        "rand_like": torch.rand,
        "randn_like": torch.randn,
        "randint_like": torch.randint,
    }
    kwargs.pop("memory_format", None)
    drawn = make[func.__name__](*args[1:], spec.local_shape, generator=g, dtype=dtype, **kwargs)
    return wrap(drawn, spec)


@function_rule(
    "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "log_normal_",
    "geometric_",
)  # fmt: skip
def fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    x = args[0]
    if not isinstance(x, ShardTensor):
        raise UnsupportedOpError(f"{func.__name__} of a plain tensor with a ShardTensor argument")
    check_writable(x, func.__name__)
    kwargs["generator"] = generator_for(x._spec, x.device, kwargs.pop("generator", None))
    inside = [a._local if isinstance(a, ShardTensor) and a._spec == x._spec else a for a in args]
    if any(isinstance(a, Tensor) and a.ndim for a in inside[1:]) and not isinstance(
        args[1], ShardTensor
    ):
        raise UnsupportedOpError(
            f"{func.__name__} with a plain tensor of parameters: shard it alike"
        )
    func(*inside, **kwargs)
    return x


@rule("bernoulli")
def bernoulli(
    input: ShardTensor, p: float | None = None, *, generator: torch.Generator | None = None
) -> ShardTensor:
    x = reduced(input)
    g = generator_for(x._spec, x.device, generator)
    drawn = torch.rand(x._spec.local_shape, generator=g, device=x.device, dtype=torch.float64)
    return wrap((drawn < (x._local if p is None else p)).to(x.dtype), x._spec)


@rule("normal")
def normal(
    mean: Tensor | float, std: Tensor | float = 1.0, *, generator: torch.Generator | None = None
) -> ShardTensor:
    given = [v for v in (mean, std) if isinstance(v, Tensor)]
    spec, wanted = align(*given)
    first, values = given[0], fit(spec.mesh, spec.varying, *zip(given, wanted, strict=True))
    g = generator_for(spec, first.device, generator)
    drawn = torch.randn(spec.local_shape, generator=g, device=first.device, dtype=first.dtype)
    local: Any = iter(values)
    mu, sigma = (next(local) if isinstance(v, Tensor) else v for v in (mean, std))
    return wrap((drawn * sigma + mu).detach(), spec)


@rule("rrelu")
def rrelu(
    input: ShardTensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Slopes of negative elements: drawn in training, the mean of the bounds otherwise."""
    if not training:
        return torch.nn.functional.leaky_relu(input, (lower + upper) / 2)
    x = reduced(input)
    g = generator_for(x._spec, x.device, generator)
    drawn = torch.rand(x._local.shape, generator=g, device=x.device, dtype=x.dtype)
    slope = lower + (upper - lower) * drawn
    return wrap(torch.where(x._local > 0, x._local, slope * x._local), x._spec)


@rule("rrelu_")
def rrelu_(input: ShardTensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.copy_(rrelu(input, *args, **kwargs))


@rule("multinomial")
def multinomial(
    input: ShardTensor, num_samples: int, replacement: bool = False, *,
    generator: torch.Generator | None = None,
) -> ShardTensor:  # fmt: skip
    """Categories (the last dim) are brought together; rows stay sharded."""
    x = aside(reduced(input), [input.ndim - 1])
    x = replicate(input) if x is None else x
    spec = x._spec.with_dims([*x._spec.dims[:-1], Dim(num_samples)])
    g = generator_for(spec, x.device, generator)
    return wrap(torch.multinomial(x._local, num_samples, replacement, generator=g), spec)
