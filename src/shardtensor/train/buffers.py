"""`shard_buffers`: what starts from a plain buffer, such as the nodes of a mesh, runs on shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..later import dt
from ..tensor import ShardTensor
from ..tensor.construct import distribute_tensor

M = TypeVar("M", bound=nn.Module)


def shard_buffers(model: M, dims: Mapping[str, int], mesh: DeviceMesh) -> M:
    """Place buffers, named as in the model's state_dict, as shards along a dim; returns the model.

    Every rank must have the same buffers; nothing is sent. mesh: that on which inputs lie. What is
    computed from a buffer is then sharded as it is. The keys of the state_dict stay, and so do its
    values: whole plain tensors, for which `state_dict()` communicates (call it on all ranks). It
    loads what a plain model saved. Before or after `parallelize`, which leaves them as they are.
    Raises ValueError for a name that is none of a buffer's, or a dim that it does not have.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, dim in dims.items():
        if name not in buffers:
            what = "is a parameter" if name in dict(model.named_parameters()) else "is no buffer"
            raise ValueError(f"shard_buffers: {name!r} {what}; buffers: {sorted(buffers)}")
        ndim = buffers[name].ndim
        if not -ndim <= dim < ndim:
            raise ValueError(f"shard_buffers: {name!r} has {ndim} dims, and no dim {dim}")
        if isinstance(buffers[name], ShardTensor):
            raise ValueError(f"shard_buffers: {name!r} is sharded already")
    made: dict[int, Tensor] = {}
    for name, dim in dims.items():
        whole = buffers[name]
        if id(whole) not in made:
            on = [dt.Shard(dim % whole.ndim)] * mesh.ndim
            made[id(whole)] = distribute_tensor(whole, mesh, on, src_data_rank=None)
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        module._buffers[key] = made[id(whole)]
        if _gathered not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_gathered)
            module.register_load_state_dict_pre_hook(_placed)
    return model


def _gathered(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """In a state_dict, whole tensors."""
    for key, x in module._buffers.items():
        if isinstance(x, ShardTensor) and prefix + key in state:
            state[prefix + key] = x.detach().full_tensor()


def _placed(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded, placed as the buffers are."""
    for key, x in module._buffers.items():
        new = state.get(prefix + key)
        if not isinstance(x, ShardTensor) or new is None or isinstance(new, ShardTensor):
            continue
        if new.shape == x.shape:
            new = new.to(x.device)
            state[prefix + key] = distribute_tensor(
                new, x.device_mesh, x.placements, src_data_rank=None, sizes=dict(x.spec.sizes)
            )
