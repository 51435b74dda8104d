"""Metrics of torchmetrics where ranks share samples: each sample counts once."""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..tensor import ShardTensor

M = TypeVar("M", bound=nn.Module)


def once(metrics: M, mesh: DeviceMesh, data: str = "data") -> M:
    """The same metric, collection or model, whose metrics are summed over `data` only.

    By themselves metrics add up what all ranks of the world have counted, though ranks of a domain
    count the same samples. What `compute` sends is theirs, among fewer ranks. A mesh without that
    axis has one group of ranks. A metric that was given a `dist_sync_fn` keeps it.
    """
    names = mesh.mesh_dim_names or ()
    group = mesh.get_group(data) if data in names and mesh[data].size() > 1 else None
    for metric in metrics.modules():
        if getattr(metric, "dist_sync_fn", ...) is None:
            vars(metric)["dist_sync_fn"] = _OverSamples(group)
    return metrics


class _OverSamples:
    """What a metric calls to have the states of all that count: whole tensors, in a list."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, state: Tensor, group: Any = None) -> list[Tensor]:
        whole = state.full_tensor() if isinstance(state, ShardTensor) else state
        if self.group is None:
            return [whole]
        gather = import_module("torchmetrics.utilities.distributed").gather_all_tensors
        found: list[Tensor] = gather(whole, self.group)
        return found

    def __deepcopy__(self, memo: Any) -> _OverSamples:
        # a group of processes has no copies
        return self
