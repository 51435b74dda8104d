"""What makes a collective one that autograd, fake tensors and compilers know."""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _torch
from .._torch import probe
from ..errors import UnsupportedOpError

_library = Library("shardtensor", "DEF")
# what each op runs; a plan runs it on fake tensors, where the dispatcher would take the fake kernel
KERNELS: dict[Any, Callable] = {}
# what stands for an op under torch.func and in forward mode, which see nothing of the op
_UNDER: dict[Any, Callable] = {}
# what does the same where no mode looks on
_ALONE: dict[Any, type[torch.autograd.Function]] = {}


def define(
    schema: str,
    kernel: Callable,
    fake: Callable,
    setup: Callable,
    adjoint: Callable,
    under: Callable | None = None,
) -> Any:
    """A dispatcher op with a fake kernel and an adjoint (setup(ctx, inputs, output), adjoint).

    under: what does the same under torch.func and in forward mode; None: the op is linear in its
    first argument, and the tangent of its result is it of the tangent. Rules call it by `run`.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardtensor::{name}", fake, lib=_library)
    kept, back = _left_out(setup, adjoint)
    torch.library.register_autograd(f"shardtensor::{name}", back, setup_context=kept, lib=_library)
    op = getattr(torch.ops.shardtensor, name).default
    KERNELS[op] = kernel
    _torch.keep_apart(op)
    _ALONE[op] = _alone(name, kernel, setup, back)
    if under is None:
        under = linear(
            lambda *args: op(*args) if probe.dispatch_modes() else kernel(*args),
            setup,
            adjoint,
            lambda *args: run(op, *args),
        ).apply
    _UNDER[op] = under
    return op


class Looking(TorchDispatchMode):
    """A dispatch mode that sees what a collective does, not the collective; `op` runs an op."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in KERNELS:
            with self:
                return KERNELS[func](*args, **(kwargs or {}))
        return self.op(func, args, kwargs or {})

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What func of these gives."""
        raise NotImplementedError


class Facts:
    """Arguments of an op in one object, which the dispatcher does not know."""

    def arguments(self) -> tuple[Any, ...]:
        """As the op takes them."""
        raise NotImplementedError


def lowered(args: tuple[Any, ...]) -> list[Any]:
    """As the dispatcher takes them."""
    return [a for x in args for a in (x.arguments() if isinstance(x, Facts) else (x,))]


def run(op: Any, *args: Any) -> Any:
    """The op; under torch.func and in forward mode what stands for it there.

    Where no mode looks on the dispatcher is not needed, which copies lists and takes longer; the
    kernel then gets `Facts` as they are.
    """
    if _torch.transforming():
        return _UNDER[op](*args)
    if probe.dispatch_modes():
        return op(*lowered(args))
    if not torch.is_grad_enabled():
        return KERNELS[op](*args)
    return _ALONE[op].apply(*args)


def _left_out(setup: Callable, adjoint: Callable) -> tuple[Callable, Callable]:
    """Both, where no gradient leads to none and nothing is sent, as in torch's own ops."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.materialize_grads = False
        setup(ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        for g in grads:
            if g is not None and not (isinstance(g, list) and all(x is None for x in g)):
                return adjoint(ctx, *grads)
        # lists of tensors have lists of gradients
        return tuple(
            [[None] * len(n) if isinstance(n, list) else None for n in ctx.needs_input_grad]
        )

    return keep, backward


def _alone(
    name: str, kernel: Callable, setup: Callable, adjoint: Callable
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.materialize_grads = False
        found = kernel(*args)
        # no view, to which autograd would let nobody write
        out = tuple([x.data for x in found]) if isinstance(found, tuple) else found.data
        setup(ctx, args, out)
        return out

    inside = {"forward": staticmethod(forward), "backward": staticmethod(adjoint)}
    return new_class(name, (_torch.Function,), exec_body=lambda body: body.update(inside))


def linear(
    kernel: Callable, setup: Callable, adjoint: Callable, again: Callable
) -> type[torch.autograd.Function]:
    """A Function of one tensor, in which it is linear, and others: all its derivatives are known.

    again: what gives the tangent, and the result for a batch, whose dim comes last meanwhile.
    """

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, *rest: Any) -> Tensor:
            return kernel(x, *rest)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)
            ctx.beside = inputs[1:]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return adjoint(ctx, g)

        @staticmethod
        def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
            return again(t, *ctx.beside)

        @staticmethod
        def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, *rest: Any) -> Any:
            if any(d is not None for d in pytree.tree_leaves(dims[1:])):
                raise UnsupportedOpError("vmap over indices of what several ranks hold")
            out = again(x.movedim(dims[0], -1), *rest)
            return out, out.ndim - 1

    return Linear


class _Facts:
    """What a Function is to take as it is."""

    def __init__(self, facts: tuple[Any, ...]) -> None:
        self.facts = facts


def paired(
    schema: str,
    kernel: Callable,
    fake: Callable,
    adjoint: Callable,
    lift: Callable,
    lower: Callable,
) -> tuple[Any, Any]:
    """(what rules call, the dispatcher op) of a collective of one tensor and facts.

    kernel(x, *facts), fake(x, *facts); adjoint(gradient, *facts) is the gradient of x. Facts may be
    plans, which the dispatcher does not know: lower(*facts) are the op's arguments beside x, and
    lift gives the facts back. Where no dispatch mode looks on, the op is not needed: a node of
    autograd alone costs a third, and nothing that has an entry for each rank is copied.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.count, ctx.facts = len(inputs) - 1, lift(*inputs[1:])

    op = define(
        schema,
        lambda x, *rest: kernel(x, *lift(*rest)),
        lambda x, *rest: fake(x, *lift(*rest)),
        setup,
        lambda ctx, g: (adjoint(g, *ctx.facts), *[None] * ctx.count),
    )

    class Node(_torch.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *facts: Any) -> Tensor:
            ctx.materialize_grads = False
            ctx.facts = facts
            return kernel(x, *facts)

        @staticmethod
        def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
            gx = None if g is None else adjoint(g, *ctx.facts)
            return gx, *[None] * len(ctx.facts)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.facts = inputs[1].facts

    under = linear(
        lambda x, held: (
            op(x, *lower(*held.facts)) if probe.dispatch_modes() else kernel(x, *held.facts)
        ),
        keep,
        lambda ctx, g: (adjoint(g, *ctx.facts), None),
        lambda x, held: call(x, *held.facts),
    )

    def call(x: Tensor, *facts: Any) -> Tensor:
        if _torch.functorch_level() is not None or _torch.dual_level() >= 0:
            return under.apply(x, _Facts(facts))
        if probe.dispatch_modes():
            return op(x, *lower(*facts))
        if x.requires_grad and torch.is_grad_enabled():
            return Node.apply(x, *facts)
        return kernel(x, *facts)

    return call, op
