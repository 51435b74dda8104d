"""`torch.autograd.grad`: the engine runs on local tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedOpError
from ..registry import rule
from ..tensor import ShardTensor
from ..tensor.lazy import engine_input
from ..tensor.redistribute import cotangent, gradient, local_of


@rule(torch.autograd.grad)
def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients by the local graphs, as ShardTensors of the inputs' specs."""
    if is_grads_batched:
        raise UnsupportedOpError("autograd.grad with is_grads_batched: call it once per gradient")
    outs, ins = _many(outputs), _many(inputs)
    given = [None] * len(outs) if grad_outputs is None else _many(grad_outputs)
    cotangents = [
        cotangent(g, o._spec) if isinstance(o, ShardTensor) and g is not None else g
        for o, g in zip(outs, given, strict=True)
    ]
    for o, g in zip(outs, cotangents, strict=True):
        if g is None and o.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    found = torch.autograd.grad(
        [local_of(o) for o in outs],
        [engine_input(i) for i in ins],
        [_ones(o) if g is None else g for o, g in zip(outs, cotangents, strict=True)],
        retain_graph=retain_graph,
        create_graph=create_graph,
        only_inputs=only_inputs,
        allow_unused=allow_unused,
        materialize_grads=materialize_grads,
    )
    return tuple(
        gradient(g, i._spec) if isinstance(i, ShardTensor) and g is not None else g
        for i, g in zip(ins, found, strict=True)
    )


def _many(xs: Any) -> Sequence[Any]:
    return [xs] if isinstance(xs, Tensor) else list(xs)


def _ones(x: Tensor) -> Tensor:
    return torch.ones_like(local_of(x))
