"""Functions of torch.nn.functional that ask who overrides them, then call one op: its handler.

Calling their body, as `resolve.opened` does, comes back through `__torch_function__` for the op:
four to seven calls of Python more. What is not as torch hands it over, and what the body or the
arguments of the op refuse, goes there all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from ..registry import Handler, handlers
from ..tensor import ShardTensor

_SHAPES, _INT = (tuple, list, torch.Size), frozenset({int})


def relu(body: Handler) -> Handler:
    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or len(kwargs) != 1 or "inplace" not in kwargs:
            return body(func, args, kwargs)
        op = torch.relu_ if kwargs["inplace"] else torch.relu
        return handlers[op](op, args, {})

    return run


def dropout(body: Handler) -> Handler:
    names = {"p", "training", "inplace"}

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs.keys() != names or not 0.0 <= kwargs["p"] <= 1.0:
            return body(func, args, kwargs)
        if type(kwargs["training"]) is not bool:
            return body(func, args, kwargs)
        op = torch.dropout_ if kwargs["inplace"] else torch.dropout
        return handlers[op](op, (args[0], kwargs["p"], kwargs["training"]), {})

    return run


def layer_norm(body: Handler) -> Handler:
    op, names = torch.layer_norm, {"weight", "bias", "eps"}

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 2 or kwargs.keys() != names:
            return body(func, args, kwargs)
        if type(args[1]) not in _SHAPES or not _INT.issuperset(map(type, args[1])):
            return body(func, args, kwargs)
        # torch has no use for the last
        given = *args, kwargs["weight"], kwargs["bias"], kwargs["eps"], True
        return handlers[op](op, given, {})

    return run


def batch_norm(body: Handler) -> Handler:
    op, names = torch.batch_norm, {"weight", "bias", "training", "momentum", "eps"}

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else None
        if type(x) is not ShardTensor or len(args) != 3 or kwargs.keys() != names:
            return body(func, args, kwargs)
        shape, training, eps = x._spec.shape, kwargs["training"], kwargs["eps"]
        if type(training) is not bool or type(kwargs["momentum"]) is not float:
            return body(func, args, kwargs)
        # of one value a channel, or such an eps, torch learns nothing
        if len(shape) < 2 or eps <= 0.0 or (training and prod(shape) <= shape[1]):
            return body(func, args, kwargs)
        given = (
            x, kwargs["weight"], kwargs["bias"], args[1], args[2], training, kwargs["momentum"],
            eps, torch.backends.cudnn.enabled,
        )  # fmt: skip
        return handlers[op](op, given, {})

    return run


# by function: its handler, of one that runs its body
DIRECT: dict[Any, Callable[[Handler], Handler]] = {
    F.relu: relu, F.dropout: dropout, F.layer_norm: layer_norm, F.batch_norm: batch_norm
}  # fmt: skip
