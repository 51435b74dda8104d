"""`tensor_parallel`: weights as DTensors on a mesh axis, for activations that are ShardTensors."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..dispatch.axes import declare
from ..later import dt, styles
from ..tensor import ShardTensor
from .replaced import check_made, replacing

M = TypeVar("M", bound=nn.Module)
# how a style, by its name, places the parameters of a module: weight, bias
_STYLES: dict[str, list[tuple[tuple[type, ...], int, int | None]]] = {
    "ColwiseParallel": [
        ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 0, 0),
        ((nn.Embedding,), 1, None),
    ],
    "RowwiseParallel": [
        ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 1, None),
        ((nn.Embedding,), 0, None),
    ],
}


def tensor_parallel(model: M, mesh: DeviceMesh, plan: Mapping[str, Any]) -> M:
    """Shard the model's weights as DTensors over a mesh axis; returns the model.

    mesh: one axis of the mesh, such as mesh["tp"]; activations are ShardTensors on other axes of it
    (mesh["domain"]), or on this one, replicated. plan: names, also with * and ?, to how they lie:
    - a module, to torch's ColwiseParallel() or RowwiseParallel(): Linear, Embedding, Conv;
    - a parameter, to a placement: Shard(0);
    - a parameter, to None: it stays a plain tensor, as code needs it that combines it with plain
      tensors before it meets an activation.
    A later entry counts. All other parameters become replicated DTensors, since optimizers and
    clip_grad_norm_ take no mixture of DTensors and plain tensors. Weights are those of the axis'
    first rank, which sends them once; what the axis sends in a step is an all-reduce, or a gather,
    for each pair of layers, as the placements say. The model gets no hooks; layouts named in a
    style change nothing, since a ShardTensor knows its own. Call it before `parallelize` and before
    the optimizer is made.

    Raises ValueError for a name that the model has not, a module that a style does not know and
    tied parameters that are to lie in two ways.
    """
    if mesh.ndim != 1:
        raise ValueError(f"tensor_parallel on a mesh of {mesh.ndim} axes; name one: mesh['tp']")
    check_made(model, "tensor_parallel")
    places = _places(model, plan)
    made: dict[nn.Parameter, nn.Parameter] = {}
    with replacing(model, "tensor_parallel"):
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is None or places[p] is None or isinstance(p, ShardTensor):
                    continue
                if p not in made:
                    d = dt.distribute_tensor(p.detach(), mesh, [places[p] or dt.Replicate()])
                    made[p] = nn.Parameter(d, p.requires_grad)
                module._parameters[key] = made[p]
    declare(mesh)
    return model


def _places(model: nn.Module, plan: Mapping[str, Any]) -> dict[nn.Parameter, dt.Placement | None]:
    """How each parameter is to lie."""
    named: dict[str, dt.Placement | None] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern, style in plan.items():
        own = parameters if style is None or isinstance(style, dt.Placement) else modules
        found = [n for n in own if fnmatchcase(n, pattern)]
        if not found:
            kind = "parameter" if own is parameters else "module"
            raise ValueError(f"tensor_parallel: the model has no {kind} named {pattern!r}")
        for name in found:
            if own is parameters:
                named[name] = style
            else:
                named.update(_styled(name, modules[name], style))
    places: dict[nn.Parameter, dt.Placement | None] = {}
    for name, p in parameters.items():
        if name in named and places.setdefault(p, named[name]) != named[name]:
            raise ValueError(
                f"tensor_parallel: {name} is tied to a parameter that lies as {places[p]}, and is "
                f"itself to lie as {named[name]}; name one placement for it"
            )
    for p in parameters.values():
        places.setdefault(p, dt.Replicate())
    return places


def _styled(name: str, module: nn.Module, style: Any) -> dict[str, dt.Placement | None]:
    known = next((t for name, t in _STYLES.items() if type(style) is getattr(styles, name)), [])
    for kinds, weight, bias in known:
        if isinstance(module, kinds):
            own = {
                "weight": dt.Shard(weight),
                "bias": dt.Replicate() if bias is None else dt.Shard(bias),
            }
            return {
                f"{name}.{k}": p for k, p in own.items() if getattr(module, k, None) is not None
            }
    raise ValueError(
        f"tensor_parallel: {type(style).__name__} for {name}, a {type(module).__name__}; "
        "ColwiseParallel and RowwiseParallel take Linear, Embedding and Conv; place others by "
        f"their parameters' names: {{'{name}.weight': Shard(0)}}"
    )
