"""Operands that are no rows of numbers in memory: refused, with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _torch
from ..errors import UnsupportedOpError
from ..registry import method
from . import apart
from .shard_tensor import ShardTensor

_NOT_DENSE = (
    "a {0} operand beside shards, which would have to be cut like them: make it dense "
    "(to_dense()), gather the ShardTensor (full_tensor()), or write a sparse product as "
    "index_select and index_add over its entries"
)
# of a Function that torch.func cannot follow, and of values that it hides
_BY_HAND = (
    *("setup_context", "getSingleLevelAutogradFunctionAllowed", "vmap", "TensorWrapper"),
    "data pointer",
)
# of torch's older vmap, behind `torch.autograd.functional.jacobian(vectorize=True)`
_OLDER = "BatchedTensorImpl", "Batching rule not implemented"


def refuse_not_dense(form: torch.layout) -> NoReturn:
    """Raise for an operand whose rows no collective can move."""
    kind = str(form).removeprefix("torch.").strip("_")
    raise UnsupportedOpError(_NOT_DENSE.format(kind))


@method
def meet(types: Iterable[type]) -> bool:
    """Whether a function is for a class that is no tensor, as `torch.fx` has one.

    Raises for one of ShardTensors and jagged tensors, whichever class comes first: inside of a
    jagged tensor shards would be values that autograd does not follow.
    """
    if ShardTensor in types and any(map(_torch.ragged.is_jagged, types)):
        refuse_not_dense(torch.jagged)
    return not all(issubclass(t, Tensor) for t in types)


_torch.ragged.watch_jagged(meet)


@method
def explain(error: Exception, func: Any, args: Any, kwargs: Any) -> None:
    """Raise UnsupportedOpError for torch's own error of an op with an operand that is not dense.

    Of one that not all ranks may have, see `apart`.
    """
    if isinstance(error, UnsupportedOpError):
        return
    apart.note(error, func, args, kwargs)
    if _torch.transforming() and any(text in str(error) for text in _BY_HAND):
        raise UnsupportedOpError(
            f"torch.func or forward mode through {getattr(func, '__name__', func)}, whose way with "
            "shards has a backward of its own: take torch.autograd.grad, or gather its operands "
            "(full_tensor())"
        ) from error
    if any(text in str(error) for text in _OLDER):
        raise UnsupportedOpError(
            f"{getattr(func, '__name__', func)} inside of torch.autograd.functional with "
            "vectorize=True: take torch.func.jacfwd or jacrev, or leave vectorize out"
        ) from error
    for x in pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, ShardTensor)):
        kind = _not_dense(getattr(x, "_local", x))
        if kind:
            name, what = getattr(func, "__name__", func), str(error).split("\n")[0]
            raise UnsupportedOpError(
                f"{name} of a {kind} tensor beside a ShardTensor ({what}): make it dense "
                "(to_dense(), dequantize(), to_padded_tensor()), or gather the ShardTensor "
                "(full_tensor())"
            ) from error


def _not_dense(x: Any) -> str:
    """What a tensor is instead of rows of numbers in memory."""
    if not isinstance(x, Tensor):
        return ""
    if x.is_nested:
        return "nested"
    if x.is_quantized:
        return "quantized"
    return "" if x.layout is torch.strided else str(x.layout).removeprefix("torch.").strip("_")
