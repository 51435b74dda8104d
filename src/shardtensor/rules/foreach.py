"""Lists of tensors, as optimizers and GradScaler have them, plain and sharded ones together.

torch._foreach_*: the single op on each tensor. Fused ones run on the local tensors: each element of
a parameter is updated by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..dispatch.writes import check_writable
from ..errors import UnsupportedOpError
from ..tensor import ShardTensor
from ..tensor.redistribute import like, local_of, reduced
from .pointwise import function_rule

_NAMES = [name for name in dir(torch) if name.startswith("_foreach_")]
_OTHER = {"norm": torch.linalg.vector_norm}
# these take numbers in the lists, too
_BOUNDS = {"maximum": "clamp_min", "minimum": "clamp_max"}


def _pick(a: Any, i: int) -> Any:
    return a[i] if isinstance(a, list | tuple) else a


@function_rule(*_NAMES)
def foreach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place where named so, and then None, as torch returns."""
    name = func.__name__.split(".")[0].removeprefix("_foreach_")
    one = _OTHER.get(name) or getattr(torch.Tensor, name, None)
    new = getattr(torch, f"_foreach_{name.rstrip('_')}", None)
    if one is None and new is not None and name.endswith("_"):
        for x, value in zip(args[0], new(*args, **kwargs), strict=True):
            x.copy_(value)
        return None
    if one is None:
        raise UnsupportedOpError(f"{func.__name__}: call the op on each tensor")
    if name.rstrip("_") in ("addcmul", "addcdiv"):
        # the factor is a keyword of the single op: a number, one for each, or a tensor of those
        factor = kwargs.pop("scalars", None)
        if len(args) > 3:
            *args, factor = args  # type: ignore[assignment]
        if factor is not None:
            kwargs["value"] = factor.tolist() if isinstance(factor, Tensor) else factor
    if name == "pow" and not isinstance(args[0], list | tuple):
        one = torch.pow
    if name.rstrip("_") in _BOUNDS and not isinstance(_pick(args[1], 0), Tensor):
        one = getattr(torch.Tensor, name.replace(name.rstrip("_"), _BOUNDS[name.rstrip("_")]))
    n = next(len(a) for a in (*args, *kwargs.values()) if isinstance(a, list | tuple))
    found = [
        one(*(_pick(a, i) for a in args), **{k: _pick(v, i) for k, v in kwargs.items()})
        for i in range(n)
    ]
    return None if name.endswith("_") else tuple(found)


_FUSED = [name for name in dir(torch) if name.startswith("_fused_") and name.endswith("_")]


@function_rule(*_FUSED)
def fused(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """args: lists of parameters, gradients, and what the optimizer keeps for each."""
    lists = [a for a in args if isinstance(a, list | tuple)]
    specs = [p._spec if isinstance(p, ShardTensor) else None for p in lists[0]]
    for x in (x for found in lists for x in found if isinstance(x, ShardTensor)):
        check_writable(x, func.__name__)
    given = []
    for a in args:
        if isinstance(a, list | tuple):
            pairs = zip(a, specs, strict=True) if a else ()
            a = [like(x, s)._local if s and x.ndim == len(s.dims) else _plain(x) for x, s in pairs]
        given.append(a)
    func(*given, **{k: _plain(v) for k, v in kwargs.items()})


def _plain(x: Any) -> Any:
    """The value of what is the same on all ranks."""
    if not isinstance(x, ShardTensor):
        return x
    whole = reduced(x)
    return whole._local if not whole._spec.varying else x.full_tensor()


@function_rule("_amp_foreach_non_finite_check_and_unscale_")
def unscale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """An overflow in any shard is one on every rank, in one message for each mesh."""
    grads, found, scale = args
    sharded = [g for g in grads if isinstance(g, ShardTensor)]
    for g in sharded:
        check_writable(g, "GradScaler.unscale_")
    local = [local_of(g) for g in grads]
    func(local, found, _plain(scale))
    for mesh in dict.fromkeys(g._spec.mesh for g in sharded if g._spec.varying):
        group = comm.group(mesh, tuple(range(mesh.ndim)))
        found.copy_(comm.reduce(found, group, "max"))
