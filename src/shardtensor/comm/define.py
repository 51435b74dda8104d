"""What makes a collective one that autograd, fake tensors and compilers know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .. import _torch
from .._torch import probe

_library = Library("shardtensor", "DEF")
# what each op runs; a plan runs it on fake tensors, where the dispatcher would take the fake kernel
KERNELS: dict[Any, Callable] = {}


def define(
    schema: str, kernel: Callable, fake: Callable, setup: Callable, adjoint: Callable
) -> Any:
    """A dispatcher op with a fake kernel and an adjoint (setup(ctx, inputs, output), adjoint)."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardtensor::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"shardtensor::{name}", adjoint, setup_context=setup, lib=_library
    )
    op = getattr(torch.ops.shardtensor, name).default
    KERNELS[op] = kernel
    return op


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

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *facts: Any) -> Tensor:
            ctx.facts = facts
            return kernel(x, *facts)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
            return adjoint(g, *ctx.facts), *[None] * len(ctx.facts)

    def call(x: Tensor, *facts: Any) -> Tensor:
        if probe.dispatch_modes():
            return op(x, *lower(*facts))
        if x.requires_grad and torch.is_grad_enabled():
            return _torch.apply(Node, x, *facts)
        return kernel(x, *facts)

    return call, op
