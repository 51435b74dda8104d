"""New tensors made from a sharded one: x.new_zeros(...), and the copying forms of views.

A new tensor of the shape of x is sharded like x. One of any other shape is a replicated
ShardTensor: whole on each rank. But where x holds a row for each entry of an index (the messages of
a graph's edges), a new tensor with a row for each row that was indexed, or put before others that
were (its nodes), lies as those; and a large one of other rows is cut along them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import handlers, rule
from ..spec import Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced
from .nodes import lies
from .operands import many
from .pointwise import check_number, function_rule, pointwise


def _made(x: ShardTensor, shape: tuple[int, ...], make: Any) -> ShardTensor:
    """What make(shape) gives, of this rank's part of the global shape."""
    spec = x._spec
    if shape != spec.shape:
        whole = Spec.whole(spec.mesh, [int(n) for n in shape])
        spec = lies(spec.cotangent, shape) or whole
    elif spec.partial:
        spec = spec.cotangent
    return wrap(make(tuple(spec.local_shape)), spec)


@function_rule("new_zeros", "new_ones", "new_empty")
def new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    x, *size = args
    shape = kwargs.pop("size", None)
    shape = many(size[0], tuple(size[1:])) if size else () if shape is None else tuple(shape)
    return _made(x, shape, lambda local: func(x._local, local, **kwargs))


@function_rule("new")
def legacy_new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x.new(size)`, which distributions fill: a `torch.Size` is a size, another tuple values."""
    x, *given = args
    if given and isinstance(given[0], torch.Size | int) and not kwargs:
        return handlers[Tensor.new_empty](Tensor.new_empty, args, {})
    if given and isinstance(given[0], ShardTensor):
        return given[0].detach()
    return func(getattr(x, "_local", x), *given, **kwargs)


@rule("new_full")
def new_full(input: ShardTensor, size: Any, fill_value: Any, **kwargs: Any) -> ShardTensor:
    check_number(input, fill_value, kwargs.get("dtype"))

    def make(shape: tuple[int, ...]) -> Tensor:
        return input._local.new_full(shape, fill_value, **kwargs)

    return _made(input, tuple(size), make)


@rule("new_empty_strided")
def new_empty_strided(input: ShardTensor, size: Any, stride: Any, **kwargs: Any) -> ShardTensor:
    """Of the shape of x the strides are the local tensor's own."""
    if tuple(size) == tuple(input.shape):
        return _made(input, tuple(size), lambda shape: input._local.new_empty(shape, **kwargs))
    return _made(
        input, tuple(size), lambda shape: input._local.new_empty_strided(shape, stride, **kwargs)
    )


@rule("new_tensor")
def new_tensor(input: Tensor, data: Any, **kwargs: Any) -> Tensor:
    grad = kwargs.pop("requires_grad", False)
    if isinstance(data, ShardTensor):
        options = {"dtype": kwargs.get("dtype"), "device": kwargs.get("device")}
        made = data.detach().clone().to(**{k: v for k, v in options.items() if v is not None})
    elif isinstance(input, ShardTensor):
        local = input._local.new_tensor(data, **kwargs)
        made = wrap(local, Spec.whole(input._spec.mesh, local.shape))
    else:
        made = input.new_tensor(data, **kwargs)
    # torch.func lets nobody ask
    return made.requires_grad_() if grad else made


@function_rule("fill")
def fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x is only asked for its shape and dtype, so a value of any dtype is written in that of x."""
    return pointwise(func, args, kwargs)


# copies of views ---------------------------------------------------------------------------------

_VIEWS = (
    "view", "expand", "permute", "t", "transpose", "squeeze", "unsqueeze", "diagonal", "unfold",
    "select", "unbind", "split", "split_with_sizes", "detach", "slice", "alias", "view_as_real",
    "view_as_complex",
)  # fmt: skip


@function_rule(*(f"{name}_copy" for name in _VIEWS))
def view_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rule of the view, then a copy of what it gives."""
    name = func.__name__.split(".")[0].removesuffix("_copy")
    if name in ("alias", "detach"):
        x = reduced(args[0])
        made: Any = x if name == "alias" else x.detach()
    else:
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if name == "view" and len(args) > 1 and not isinstance(args[1], torch.dtype):
            # of what is no view torch copies all the same
            name = "reshape"
        view = getattr(torch.Tensor, name, getattr(torch, name, torch.ops.aten.slice.Tensor))
        made = handlers[view](view, args, kwargs)
    rows = torch.contiguous_format
    if isinstance(made, Tensor):
        return made.clone(memory_format=rows)
    return tuple(m.clone(memory_format=rows) for m in made)
