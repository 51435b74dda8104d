"""The whole state of a model under FSDP2 and of its optimizer, as one device has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..later import dt, fsdp2, states


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps the parameters of the model in shards."""
    return any(isinstance(m, fsdp2.FSDPModule) for m in model.modules())


def model_state(model: nn.Module, here: bool | None = None) -> dict[str, Any]:
    """The model's state_dict, whole on the CPU of the first rank, empty on the others.

    here: whether this rank gets it instead; every rank says so, or none.
    """
    if here is not None:
        return _on_cpu(states.get_model_state_dict(model), here)
    return states.get_model_state_dict(model, options=_options(cpu_offload=True))


def load_model(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Put a whole state, which every rank has, into the shards."""
    states.set_model_state_dict(model, dict(state), options=_options(strict=strict))


def optimizer_state(
    model: nn.Module, optimizer: Optimizer, here: bool | None = None
) -> dict[str, Any]:
    """The optimizer's state_dict as torch numbers it, on the ranks that `model_state` names."""
    state: Any
    if not optimizer.state:
        # torch (2.13) would make one by a step of nothing, which counts in the bias of moments
        mine = dist.get_rank() == 0 if here is None else here
        return optimizer.state_dict() if mine else {}
    if here is not None:
        state = _on_cpu(states.get_optimizer_state_dict(model, optimizer), here)
    else:
        state = states.get_optimizer_state_dict(
            model, optimizer, options=_options(cpu_offload=True)
        )
    numbers = {name: i for i, name in enumerate(_names(model, optimizer))}
    return _renamed(state, numbers) if state else {}


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put a whole state, as torch numbers it, which every rank has, into the shards."""
    if not state["state"]:
        optimizer.load_state_dict(dict(state))
        return
    named = _renamed(state, dict(enumerate(_names(model, optimizer))))
    states.set_optimizer_state_dict(model, optimizer, named, options=_options())
    for p, mine in optimizer.state.items():
        # torch (2.13) leaves 0-dim tensors as they are, whatever parameter they belong to
        if isinstance(p, dt.DTensor) and not p.ndim:
            for key, x in mine.items():
                if key != "step" and isinstance(x, Tensor) and not isinstance(x, dt.DTensor):
                    here = x.to(p.device)
                    mine[key] = dt.DTensor.from_local(
                        here, p.device_mesh, p.placements, run_check=False
                    )


def _on_cpu(state: Any, here: bool) -> dict[str, Any]:
    """A state of shards made whole, one tensor at a time; empty where it is not wanted."""

    def whole(x: Any) -> Any:
        x = x.full_tensor() if isinstance(x, dt.DTensor) else x
        return x.cpu() if here and isinstance(x, Tensor) else None if isinstance(x, Tensor) else x

    found: dict[str, Any] = pytree.tree_map(whole, state)
    return found if here else {}


def _options(**more: Any) -> Any:
    return states.StateDictOptions(full_state_dict=True, **more)


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order by which it numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names of parameters."""
    return {
        "state": {names[k]: v for k, v in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[k] for k in group["params"]]}
            for group in state["param_groups"]
        ],
    }
