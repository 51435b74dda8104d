"""`torch.autograd.grad`: the engine runs on local tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..errors import UnsupportedOpError
from ..registry import rule
from ..spec import Spec
from ..tensor import ShardTensor
from ..tensor.anomaly import watching
from ..tensor.lazy import engine_input
from ..tensor.nodes import edge_of, spec_of
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
    specs = [spec_of(o) for o in outs]
    cotangents = [
        g if g is None or spec is None else cotangent(g, spec)
        for spec, g in zip(specs, given, strict=True)
    ]
    for o, spec, g in zip(outs, specs, cotangents, strict=True):
        if g is None and _shape(o, spec).numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    options: Any = {
        "retain_graph": retain_graph, "create_graph": create_graph, "only_inputs": only_inputs,
        "allow_unused": allow_unused, "materialize_grads": materialize_grads,
    }  # fmt: skip
    local: Any = (
        [edge_of(local_of(o)) for o in outs],
        # edges stay as they are: what runs the engine knows them
        [i if isinstance(i, GradientEdge) else engine_input(i) for i in ins],
        [_ones(o) if g is None else g for o, g in zip(outs, cotangents, strict=True)],
    )
    if torch.is_anomaly_enabled():
        with watching(outs):
            found: Any = torch.autograd.grad(*local, **options)
    else:
        found = torch.autograd.grad(*local, **options)
    return tuple(
        gradient(g, i._spec) if isinstance(i, ShardTensor) and g is not None else g
        for i, g in zip(ins, found, strict=True)
    )


def _many(xs: Any) -> Sequence[Any]:
    return [xs] if isinstance(xs, Tensor | GradientEdge) else list(xs)


def _shape(x: Any, spec: Spec | None) -> torch.Size:
    if spec is not None:
        return spec.shape
    return torch.Size(_facts(x).shape) if isinstance(x, GradientEdge) else x.shape


def _facts(x: GradientEdge) -> Any:
    """What the node of an edge knows of its result."""
    return x.node._input_metadata[x.output_nr]


def _ones(x: Any) -> Tensor | None:
    # of an edge the engine makes them
    return None if isinstance(x, GradientEdge) else torch.ones_like(local_of(x))
