"""An op without a rule: gather, run replicated, shard again; within a budget, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import _torch
from ..caller import call_of_user
from ..comm import counters
from ..errors import UnsupportedOpError
from ..settings import current, setting
from ..spec import Spec
from ..tensor import ShardTensor, layout, wrap
from ..tensor.apart import alike
from ..tensor.dense import refuse_not_dense
from ..tensor.offset import begins_its_memory
from ..tensor.random import matching, memory_order
from ..tensor.redistribute import replicate, to_dims
from .writes import stands_for_view

DEFAULT_MAX_BYTES = 1 << 26
# a library's collectives on one rank's rows, or on some ranks only
_COLLECTIVE = ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd")


class FallbackWarning(UserWarning):
    """An op ran replicated, because it has no rule."""


_warned: set[tuple[str, str]] = set()


@contextmanager
def fallback(mode: str = "replicate", *, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[None]:
    """What happens to an op without a rule, inside this context.

    "replicate": gather its operands, run it on every rank, shard again, with one warning for each
    op and line; UnsupportedOpError where the operands exceed max_bytes. "error": always
    UnsupportedOpError. Raises ValueError for another mode.
    """
    if mode not in ("replicate", "error"):
        raise ValueError(f'fallback mode {mode!r}: use "replicate" or "error"')
    with setting("fallback", max_bytes if mode == "replicate" else -1):
        yield


def limit() -> int:
    """The bytes that an op without a rule may gather, -1 if it may not run."""
    return int(current("fallback", DEFAULT_MAX_BYTES))


def fall_back(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run func on gathered operands, or raise UnsupportedOpError."""
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=is_shard)
    sharded = [x for x in leaves if is_shard(x)]
    name = op_name(func)
    if getattr(func, "namespace", "") in _COLLECTIVE:
        raise UnsupportedOpError(
            f"torch.distributed's {name} of a ShardTensor, whose value is whole and alike on all "
            "ranks already: leave it out, or give x.full_tensor() or x.to_local()"
        )
    _check(func, name, leaves, sharded, kwargs)
    _noted(name, sharded)
    # strides are meaningless but for the layout that the wrapper shows
    if name.startswith("as_strided"):
        if any(not x.is_contiguous() for x in sharded):
            raise UnsupportedOpError(f"{name} of a tensor that is not contiguous: use view ops")
        _check_offset(name, args, kwargs)
    return gathered(func, args, kwargs)


def _check_offset(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if an as_strided counts from the start of memory that its tensor need not begin."""
    place = 4 if "scatter" in name else 3
    given = kwargs.get("storage_offset", args[place] if len(args) > place else None)
    x = args[0] if args else kwargs.get("self", kwargs.get("input"))
    if given is not None and isinstance(x, ShardTensor) and not begins_its_memory(x):
        raise UnsupportedOpError(
            f"{name} with a storage_offset, of {x._spec}, a slice, whose place in memory is not "
            "known: leave storage_offset out, or use view ops"
        )


def gathered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """func of whole operands, on every rank, its result sharded again."""
    leaves, tree = pytree.tree_flatten((args, kwargs or {}), is_leaf=is_shard)
    sharded = [x for x in leaves if is_shard(x)]
    name = op_name(func)
    packet = _torch.aten_packet(name.split(".")[0])
    view = packet is not None and _torch.is_view(packet)
    args, kwargs = pytree.tree_unflatten([_whole(x) if is_shard(x) else x for x in leaves], tree)

    def finish(t: torch.Tensor) -> ShardTensor:
        if t.layout is not torch.strided:
            raise UnsupportedOpError(
                f"{name} gives a {t.layout} tensor, which a ShardTensor cannot be: call it on "
                "x.full_tensor() or x.to_local()"
            )
        out = _shard_again(t, sharded)
        if view:
            stands_for_view(out._local, sharded[0]._local, name)
        return out

    found = alike(True, partial(func, **kwargs), *args)
    return pytree.tree_map_only(torch.Tensor, finish, found)


def into_plain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run func, which writes to a plain tensor, whole on every rank, on gathered operands."""
    leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=is_shard)
    sharded = [x for x in leaves if is_shard(x)]
    name = op_name(func)
    _check_operands(name, leaves, sharded)
    _noted(name, sharded)
    args, kwargs = pytree.tree_unflatten([_whole(x) if is_shard(x) else x for x in leaves], tree)
    return alike(True, partial(func, **kwargs), *args)


def _whole(x: ShardTensor) -> torch.Tensor:
    """The whole tensor, with one device's order of dims in memory."""
    local = replicate(x)._local
    order = memory_order(x) if matching() else layout.order(x)
    if list(order) == sorted(order):
        return local
    return layout.as_stored(torch.Tensor.contiguous, local, order)


def is_shard(x: Any) -> bool:
    """Whether x is a ShardTensor: stops a tree walk at it."""
    return isinstance(x, ShardTensor)


def op_name(func: Any) -> str:
    """What a message calls the function."""
    return getattr(func, "__name__", str(func))


def _check(
    func: Any, name: str, leaves: list[Any], sharded: list[ShardTensor], kwargs: dict[str, Any]
) -> None:
    specs = ", ".join(str(x._spec) for x in sharded)
    mutates = isinstance(func, _torch.OpOverload) and _torch.is_mutable(func)
    if mutates or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None:
        raise UnsupportedOpError(
            f"{name} in place on {specs}: no rule; use the op that returns a new tensor"
        )
    _check_operands(name, leaves, sharded)


def _check_operands(name: str, leaves: list[Any], sharded: list[ShardTensor]) -> None:
    """Raise if the operands can not be gathered: meshes, layouts, draws, the limit."""
    specs = ", ".join(str(x._spec) for x in sharded)
    if len({x._spec.mesh for x in sharded}) != 1:
        raise UnsupportedOpError(f"{name}: tensors on different meshes ({specs})")
    for x in leaves:
        if isinstance(x, torch.Tensor) and x.layout is not torch.strided:
            refuse_not_dense(x.layout)
    packet = _torch.aten_packet(name)
    alike = matching() and not _torch.is_tracing()
    if packet is not None and _torch.is_random(packet) and not alike:
        raise UnsupportedOpError(
            f"{name} on {specs}: no rule for drawing these numbers shard by shard; "
            "draw on a plain tensor and distribute it, or draw what one device does, on gathered "
            "operands, with shardtensor.random.match_single_device()"
        )
    nbytes = sum(x.numel() * x.element_size() for x in sharded if x._spec.varying)
    if nbytes and nbytes > limit():
        raise UnsupportedOpError(
            f"{name} has no rule for {specs}. It would gather {nbytes} bytes on every rank; "
            "allow that with shardtensor.fallback(max_bytes=...), redistribute its operands, or "
            "register a rule with shardtensor.rule"
        )


def _noted(name: str, sharded: list[ShardTensor]) -> None:
    nbytes = sum(x.numel() * x.element_size() for x in sharded if x._spec.varying)
    if nbytes:
        _warn(name, nbytes)
        counters.gathering(name, nbytes)


def _warn(name: str, nbytes: int) -> None:
    line = call_of_user()[0] or "?"
    if (name, line) not in _warned:
        _warned.add((name, line))
        warnings.warn(
            f"{name} has no rule: gathered {nbytes} bytes on every rank ({line})",
            FallbackWarning,
            stacklevel=2,
        )


def _shard_again(t: torch.Tensor, sharded: list[ShardTensor]) -> ShardTensor:
    whole = wrap(t, Spec.whole(sharded[0]._spec.mesh, t.shape))
    dims = next((x._spec.dims for x in sharded if x._spec.varying and x.shape == t.shape), None)
    if dims is None:
        # rows that were cut are cut again where the result has as many
        rows = zip(sharded[0]._spec.dims, t.shape, strict=False)
        again = {d: dim for d, (dim, n) in enumerate(rows) if dim.size == n}
        dims = whole._spec.replace(again).dims
    out = to_dims(whole, dims)
    if not t.is_contiguous():
        out._strides = layout.Strides.of(t.shape, t.stride())
    return out
