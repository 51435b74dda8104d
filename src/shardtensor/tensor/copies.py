"""Copies of ShardTensors: shallow, deep and pickled ones.

As of torch's tensors: a parameter stays one, requires_grad and attributes of the user go along.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import method, methods
from . import layout
from .aliases import relate_copies
from .offset import copy_place
from .shard_tensor import ShardTensor, wrap

# what the library sets on a tensor; torch's mark of a parameter
_OWN = {*ShardTensor.__annotations__, "_bypassed", "_recipe", "_others", "_is_param"}


def _attributes(x: ShardTensor) -> dict[str, Any]:
    """What a user has set on a tensor."""
    given = vars(x).items()
    return {k: v for k, v in given if k not in _OWN and not k.startswith("_shardtensor")}


def _marked(made: ShardTensor, x: ShardTensor) -> ShardTensor:
    """made, a parameter if x is one."""
    if isinstance(x, nn.Parameter):
        made._is_param = True
    return made


@method
def shallow_copy(x: ShardTensor) -> ShardTensor:
    """A leaf of the same memory."""
    local = x._local.detach()
    made = wrap(local.requires_grad_(x.requires_grad), x._spec, x._strides)
    vars(made).update(_attributes(x))
    return _marked(made, x)


@method
def deep_copy(x: ShardTensor, memo: dict[int, Any]) -> ShardTensor:
    """A copy with memory of its own; torch's of a parameter has neither gradient nor attributes."""
    if id(x) not in memo:
        local = x.to_local()
        if isinstance(x, nn.Parameter):
            local = local.detach().clone().requires_grad_(x.requires_grad)
            made = _marked(wrap(local, x._spec, x._strides), x)
        else:
            made = wrap(copy.deepcopy(local, memo), x._spec, x._strides)
            if local.layout is torch.strided:
                copy_place(x, made)
                relate_copies(local, made._local, memo)
            vars(made).update(copy.deepcopy(_attributes(x), memo))
        memo[id(x)] = made
    found: ShardTensor = memo[id(x)]
    return found


@method
def pickled(x: ShardTensor, protocol: Any) -> Any:
    """The full value as a plain tensor or parameter: every rank must pickle."""
    whole = layout.in_order_of(x.full_tensor().detach(), layout.stride(x))
    if isinstance(x, nn.Parameter):
        whole = nn.Parameter(whole, x.requires_grad)
    elif x.requires_grad:
        whole.requires_grad_()
    vars(whole).update(_attributes(x))
    return whole.__reduce_ex__(protocol)


@method
def take_data(x: ShardTensor, value: Tensor) -> None:
    """x.data = value: its memory where it lies as x does, else a copy in its strides."""
    new: ShardTensor = methods["like"](value, x._spec)
    if new._local is not getattr(value, "_local", value):
        lies = value.stride()
        new = layout.told(wrap(layout.in_order_of(new._local, lies), x._spec), lies)
    x._local.data, x._strides = new._local, new._strides
