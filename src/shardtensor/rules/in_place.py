"""Ops that write: what a rule gives, computed aside, goes into the tensor that is written to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch.promote import adopt_rows
from ..dispatch.writes import check_writable
from ..registry import rule, takes_plain
from ..spec import Spec
from ..tensor import ShardTensor
from ..tensor.redistribute import like, replicate
from .nodes import lies


def assigned(x: Tensor, op: str, new: Any) -> Tensor:
    """x, a plain tensor or a ShardTensor, with the values of new() written into it."""
    if isinstance(x, ShardTensor):
        check_writable(x, op)
        made = new()
        if made.shape != x.shape:
            raise RuntimeError(f"{op}: a result of shape {[*made.shape]} for one of {[*x.shape]}")
        if not torch.can_cast(made.dtype, x.dtype):
            raise RuntimeError(f"{op}: result type {made.dtype} can't be cast to {x.dtype}")
        x._local.copy_(like(made, x._spec)._local)
    else:
        x.copy_(replicate(new())._local)
    return x


def in_place(fn: Any, *names: str, reads: bool = False) -> None:
    """Register the in-place variant of a rule, and of others that it serves.

    reads: whether its gradient needs what the write overwrites.
    """
    name = f"{fn.__name__}_"

    @rule(name, *names)
    @takes_plain
    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # adopt_rows counts the references to x: this must be its only name here
        x, *rest = args if args else (kwargs.pop("input"),)
        if not isinstance(x, ShardTensor):
            target = _of_nodes(x.shape, rest, kwargs)
            if target is not None:
                adopt_rows(x, target, indexed=False)
        before = x
        if reads and torch.is_grad_enabled():
            before = x.clone()
        return assigned(x, name, partial(fn, before, *rest, **kwargs))

    run.takes_function = True  # type: ignore[attr-defined]


def _of_nodes(shape: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Spec | None:
    """How the rows lie into which values of edges are written; None where nothing tells."""
    values = args[2] if len(args) > 2 else kwargs.get("src", kwargs.get("source"))
    if not isinstance(values, ShardTensor) or values._spec.partial:
        return None
    return lies(values._spec, shape)
