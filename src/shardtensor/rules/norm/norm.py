"""Batch, instance and group norm: local where a statistic lies on one rank, else by global ones.

Laws:
- No sharded dim is averaged over: the plain op on the local shard, nothing is sent.
- A sharded dim is averaged over: each rank takes mean and variance of its part, one message of
  these few numbers brings them together on every rank. Backward is one all-reduce of two sums; it
  also makes the gradients of weight and bias whole. See `normalise`.
- Running statistics are the global ones, the same bits on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import comm
from ...cache import cached
from ...dispatch.fallback import fall_back
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import beside, fit, like, replicate
from ..empty import stock
from ..operands import lifted
from ..pointwise import function_rule
from ..reduce import count
from .checks import hold_dtypes, of_images
from .cuda_norm import normalise
from .moments import Dims, accumulated, merged, normalised, single, spread, statistics
from .normalise import Way
from .numbers import Numbers, track


def autocast(x: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
    """x in the dtype in which autocast runs op."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(op(x.detach().new_zeros((1,) * x.ndim)).dtype)


def buffers(name: str, *xs: Tensor | None) -> list[Tensor | None]:
    """The plain running statistics, whole on this rank."""
    found = []
    for x in xs:
        if isinstance(x, ShardTensor) and (x._spec.varying or x._spec.partial):
            raise UnsupportedOpError(
                f"{name}: running statistics on {x._spec}; keep them as plain or replicated tensors"
            )
        found.append(x._local if isinstance(x, ShardTensor) else x)
    return found


@torch.no_grad()
def whole(spec: Spec, dims: Sequence[Dim], *values: Numbers) -> Tensor:
    """Small local values, which lie in dims, stacked and whole on every rank."""
    found = torch.stack([torch.as_tensor(v).detach() for v in values])
    stacked = wrap(found, spec.with_dims([Dim(len(values)), *dims]))
    return replicate(stacked)._local


@cached
def _batch(spec: Spec, eps: float) -> tuple[Dims, int, Way]:
    """For each channel: the mesh axes that share its elements, how many they are, the statistic."""
    dims = (0, *range(2, len(spec.dims)))
    axes, counts = spread(spec, dims)
    n = prod(spec.shape[d] for d in dims)
    return axes, n, Way(counts, n, comm.group(spec.mesh, axes) if axes else None, eps)


@rule("batch_norm")
def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> ShardTensor:
    """Per channel, over all other dims; sharded channels stay where they are."""
    x = lifted(input, weight, bias, running_mean, running_var)
    spec, local = x._spec, x._local
    if torch.is_autocast_enabled(local.device.type):
        local = autocast(local, lambda z: torch.batch_norm(
            z, None, None, None, None, True, 0.0, 1.0, False
        ))  # fmt: skip
    if len(spec.dims) < 2:
        raise UnsupportedOpError(f"batch_norm of {spec}, which has no dim of channels")
    running = buffers("batch_norm", running_mean, running_var)
    channels = spec.dims[1]
    for w in (weight, bias):
        if w is not None and w.numel() != channels.size:
            raise RuntimeError(f"weight and bias should contain {channels.size} elements")
    axes, n, way = _batch(spec, eps)
    mine = (channels,)
    if training and not n:  # nothing to learn from: running statistics stay
        running, axes = [None, None], ()
    if not training or not axes:
        w, b = fit(spec.mesh, spec.varying, (weight, mine), (bias, mine))
        mean, var = running
        if channels.axes:
            # not by `fit`: to torch.func they would have a derivative. Written to: no views
            part = Spec(spec.mesh, mine)
            mean, var = (r if r is None else like(r, part)._local.clone() for r in running)
        rest: Any = (training, momentum, eps, cudnn_enabled)
        try:
            xs = *single(local, w, b), mean, var
            y = stock(lambda *z: of_images(torch.batch_norm, *z, *rest), local.shape, *xs)
        finally:  # a checkpoint stops what it repeats where the last tensor is saved
            for r, own in zip(running, (mean, var), strict=True):
                if training and r is not None and own is not None and own is not r:
                    r.copy_(whole(spec, mine, own)[0])
        return wrap(y, spec)
    hold_dtypes(torch.batch_norm, local, weight, bias, *running)
    # gradients of what is whole here are summed with the statistics'
    given: Any = None if channels.axes else beside(spec, None, weight, bias)
    w, b = given or fit(spec.mesh, channels.axes, (weight, mine), (bias, mine))
    kept: list[Numbers] = []
    tracked = running[0] is not None or running[1] is not None
    moved = None if channels.axes else (running[0], running[1], momentum)
    try:
        y = normalise(local, w, b, way, kept if tracked else None, moved)
    finally:
        if kept:
            track(running, whole(spec, mine, *kept) if channels.axes else kept, n, momentum)
    return wrap(y, spec)


@function_rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"
)
def native_batch_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gathered; running statistics that are cut would be updated in a copy."""
    names = ("input", "weight", "bias", "running_mean", "running_var")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    buffers(func.__name__, *(given.get(name) for name in names[3:]))
    return fall_back(func, args, kwargs)


def _scattered(x: ShardTensor) -> bool:
    """Whether the whole has samples that lie in another order than rows first."""
    return x.shape[0] > 1 and not layout.is_contiguous(x, torch.contiguous_format)


@rule("instance_norm")
def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> ShardTensor:
    """Per sample and channel, over the spatial dims; running statistics average over the batch."""
    if not use_input_stats:
        return batch_norm(
            input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled
        )
    x = lifted(input, weight, bias, running_mean, running_var)
    spec, local = x._spec, x._local
    # torch gives rows first, whatever it gets
    local = autocast(local, lambda z: torch.instance_norm(
        z, None, None, None, None, True, 0.0, 1.0, False
    )).contiguous()  # fmt: skip
    running = buffers("instance_norm", running_mean, running_var)
    tracked = any(r is not None for r in running)
    hold_dtypes(torch.instance_norm, local, weight, bias, *running)
    channels = spec.dims[1]
    dims = tuple(range(2, len(spec.dims)))
    axes, counts = spread(spec, dims)
    apart = tuple(sorted(spec.dims[0].axes + channels.axes))
    w, b = fit(spec.mesh, apart, (weight, (channels,)), (bias, (channels,)))
    if not axes and not (tracked and apart):
        rest = (*running, True, momentum, eps, cudnn_enabled)
        xs = single(local, w, b)
        y = stock(lambda *z: of_images(torch.instance_norm, *z, *rest), local.shape, *xs)
        return wrap(y, spec)
    kept: list[Numbers] = []
    n = max(1, count(x, dims))
    way = Way(counts, n, comm.group(spec.mesh, axes) if axes else None, eps, apart=True)
    y = normalise(local, w, b, way, kept)
    if tracked:
        parts = (k.reshape(local.shape[:2]) for k in kept)
        track(running, whole(spec, spec.dims[:2], *parts).mean(1), n, momentum)
    return wrap(y, spec)


def _varied(values: Sequence[Tensor], group: str | None) -> list[Tensor]:
    return comm.vary(values, group) if group else list(values)


@rule("group_norm")
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ShardTensor:
    """Per sample and group of channels, over the group and the spatial dims.

    Sharded channels stay where they are: groups that straddle shards take their statistics from
    those of the channels, which one more small all-gather brings together.
    """
    x = layout.suggested(lifted(input, weight, bias))
    spec, local = x._spec, x._local
    batch, channels = spec.dims[:2]
    if num_groups <= 0 or channels.size % num_groups:
        raise RuntimeError(
            f"group_norm: {channels.size} channels cannot be divided into {num_groups} groups"
        )
    local = autocast(local, lambda z: torch.group_norm(z, 1))
    if not channels.size:  # torch 2.14 refuses it
        torch.group_norm(local.new_empty((1, 0)), num_groups)
        return x
    hold_dtypes(torch.group_norm, local, weight, bias)
    width = channels.size // num_groups
    aligned = all(start % width == 0 for start in channels.offsets)
    dims = tuple(range(2, len(spec.dims)))
    axes, counts = spread(spec, dims)
    if aligned:
        apart = tuple(sorted(batch.axes + channels.axes))
        w, b = fit(spec.mesh, apart, (weight, (channels,)), (bias, (channels,)))
        if not axes:
            # of a negative one the row in place of none may be NaN
            rest: Any = (eps if local.numel() else abs(eps), cudnn_enabled)
            n = max(1, local.shape[1] // width)
            xs = single(local, w, b)
            y = stock(lambda z, *wb: torch.group_norm(z, n, *wb, *rest), local.shape, *xs)
            return wrap(y, spec)
        n = max(1, width * count(x, dims))
        group = comm.group(spec.mesh, axes)
        way = Way(counts, n, group, eps, apart=True, width=width, scattered=_scattered(x))
        return wrap(normalise(local, w, b, way), spec)
    w, b = fit(spec.mesh, batch.axes, (weight, None), (bias, None))
    return wrap(_straddling(spec, local, w, b, num_groups, eps), spec)


def _straddling(
    spec: Spec, local: Tensor, w: Tensor | None, b: Tensor | None, num_groups: int, eps: float
) -> Tensor:
    """Group norm where groups straddle shards of the channels."""
    batch, channels = spec.dims[:2]
    width = channels.size // num_groups
    axes, counts = spread(spec, tuple(range(2, len(spec.dims))))
    group = comm.group(spec.mesh, axes) if axes else None
    dtype = accumulated(local.dtype)
    channel = local.unsqueeze(2)
    found = statistics(channel, tuple(range(2, channel.ndim)), counts, group, dtype)
    mean, m2 = (s.flatten(1) for s in found)
    straddling = [spec.with_dims([Dim(n), batch, channels]) for n in (2, 3)]
    together = [spec.with_dims([Dim(n), batch, channels.whole]) for n in (2, 3)]
    both = like(wrap(torch.stack((mean, m2)), straddling[0]), together[0])._local
    both = both.unflatten(2, (num_groups, width)).movedim(3, 0)
    mean, m2 = merged(both[:, 0], both[:, 1], (sum(counts),) * width)

    def deal(*coefficients: Tensor) -> Sequence[Tensor]:
        whole = wrap(torch.stack(coefficients), together[1])
        center, a, b = like(whole, straddling[1])._local
        return _varied((center.detach(), a, b), group)

    n = width * sum(counts)
    mean, var = (s.repeat_interleave(width, 1) for s in (mean, m2 / n))  # (B, C)
    return normalised(local, mean, var, w, b, eps, deal)
