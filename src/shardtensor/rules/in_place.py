"""Ops that write: what a rule gives, computed aside, goes into the tensor that is written to."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch.writes import check_writable
from ..registry import rule, takes_plain
from ..tensor import ShardTensor
from ..tensor.redistribute import like, replicate


def assigned(x: Tensor, op: str, new: Any) -> Tensor:
    """x, a plain tensor or a ShardTensor, with the values of new() written into it."""
    if isinstance(x, ShardTensor):
        check_writable(x, op)
        x._local.copy_(like(new(), x._spec)._local)
    else:
        x.copy_(replicate(new())._local)
    return x


def in_place(fn: Any) -> None:
    """Register the in-place variant of a rule."""
    name = f"{fn.__name__}_"

    @rule(name)
    @takes_plain
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = input
        if "reduce" in name and torch.is_grad_enabled():
            # its gradient needs what the write overwrites
            before = input.clone()
        return assigned(input, name, partial(fn, before, *args, **kwargs))
