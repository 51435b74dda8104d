"""vary and reduce: sums over the ranks, forward or backward, of several tensors in one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch import probe
from ..errors import UnsupportedOpError
from . import wire
from .define import define

# without a call of Python
is_there = partial(is_not, None)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.rest = inputs[1:]


class Identity(_torch.Function):
    """The identity, as views; a subclass says what `about` means to its backward."""

    @staticmethod
    def forward(ctx: Any, about: Any, *xs: Tensor) -> tuple[Tensor, ...]:
        # as `set_materialize_grads` does, with no call
        ctx.materialize_grads = False
        ctx.about = about
        # one, as most are, without a comprehension, which is a call of Python
        return (xs[0].view_as(xs[0]),) if len(xs) == 1 else tuple([x.view_as(x) for x in xs])


class Vary(Identity):
    """`vary` along a group without the dispatcher, outside of tracing: a third of the cost."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(map(is_there, grads)):
            return None, *reduce(grads, "sum", ctx.about)  # type: ignore[arg-type]
        return None, *of_given(reduce, grads, "sum", ctx.about)


class Reduce(_torch.Function):
    """`reduce_op` without the dispatcher, for use outside of tracing."""

    @staticmethod
    def forward(ctx: Any, op: str, group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.materialize_grads = False
        ctx.op, ctx.group = op, group
        return tuple(_reduce(xs, op, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_reduce_adjoint(ctx, grads)


class _VaryUnder(torch.autograd.Function):
    """`vary` under torch.func and in forward mode."""

    @staticmethod
    def forward(group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple([x.clone() for x in xs])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *reduce(grads, "sum", ctx.group)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        # a tangent has derivatives, too, which are summed as those of its value are
        return tuple(vary(tangents, ctx.group))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], group: str, *xs: Tensor) -> Any:
        return tuple(vary(xs, group)), dims[1:]


class _ReduceUnder(torch.autograd.Function):
    """`reduce` under torch.func and in forward mode."""

    @staticmethod
    def forward(op: str, group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        if probe.dispatch_modes():
            return tuple(reduce_op(list(xs), op, group))
        return tuple(_reduce(xs, op, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, ctx.group = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_reduce_adjoint(ctx, grads)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        if ctx.op != "sum":
            raise UnsupportedOpError(
                f"forward mode through a {ctx.op} over the shards of a dim: redistribute that dim "
                "to Replicate() before it, or take torch.autograd.grad"
            )
        return tuple(reduce(tangents, "sum", ctx.group))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], op: str, group: str, *xs: Tensor) -> Any:
        return tuple(reduce(xs, op, group)), dims[2:]


def _vary(xs: Sequence[Tensor], group: str) -> list[Tensor]:
    # a dispatcher op may not return its argument
    return [x.clone() for x in xs]


def _reduce(xs: Sequence[Tensor], op: str, group: str) -> list[Tensor]:
    found = wire.all_reduce(xs, op, group)
    # results of a dispatcher op may not share the buffer that they travelled in, nor be views, to
    # which autograd would let nobody write
    return [found[0].data] if len(found) == 1 else [x.clone() for x in found]


def _reduce_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.op, ctx.group = inputs


def _reduce_adjoint(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    if ctx.op != "sum":
        raise NotImplementedError(f"the gradient of an all-reduce with {ctx.op}")
    if all(map(is_there, grads)):
        return vary(grads, ctx.group)  # type: ignore[arg-type]
    return of_given(vary, grads, ctx.group)


def of_given(
    do: Callable[..., Sequence[Tensor]], grads: Sequence[Tensor | None], *how: Any
) -> Sequence[Tensor | None]:
    """What do(gradients, *how) makes of those that are there, and None of the others.

    Which are there follows from the graph, alike on all ranks.
    """
    there = list(filter(is_there, grads))
    found = iter(do(there, *how) if there else ())
    return [None if g is None else next(found) for g in grads]


vary_op = define(
    "vary(Tensor[] xs, str group) -> Tensor[]",
    _vary,
    lambda xs, group: [torch.empty_like(x) for x in xs],
    _keep_arguments,
    lambda ctx, grads: (list(of_given(reduce_op, grads, "sum", *ctx.rest)), None),
)
reduce_op: Any = define(
    "reduce(Tensor[] xs, str op, str group) -> Tensor[]",
    _reduce,
    lambda xs, op, group: [x.new_empty(x.shape) for x in xs],
    _reduce_setup,
    lambda ctx, grads: (list(_reduce_adjoint(ctx, grads)), None, None),
)


def vary(xs: Sequence[Tensor], group: str) -> Sequence[Tensor]:
    """`vary_op` where a graph is being traced, else its cheaper equal."""
    if _torch.functorch_level() is not None or _torch.dual_level() >= 0:
        return _VaryUnder.apply(group, *xs)
    if _torch.is_tracing():
        return vary_op(list(xs), group)
    return Vary.apply(group, *xs)


def reduce(xs: Sequence[Tensor], op: str, group: str) -> Sequence[Tensor]:
    """`reduce_op` where a mode looks on, else its cheaper equal."""
    if _torch.functorch_level() is not None or _torch.dual_level() >= 0:
        return _ReduceUnder.apply(op, group, *xs)
    if probe.dispatch_modes():
        return reduce_op(list(xs), op, group)
    if torch.is_grad_enabled():
        for x in xs:
            if x.requires_grad:
                return Reduce.apply(op, group, *xs)
    return _reduce(xs, op, group)
