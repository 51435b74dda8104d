"""Batches of trainers: plain tensors that every rank of a domain has, cut for its ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..containers import mapped
from ..later import dt
from ..tensor import ShardTensor
from ..tensor.construct import distribute_tensor

# a dim along which tensors that have it are cut, a function of batch and mesh, or nothing to do
Shard = int | Callable[[Any, DeviceMesh], Any] | None


def check_dealt(loader: Any, groups: int) -> None:
    """Raise ValueError for a loader whose sampler deals samples to single ranks of a domain."""
    dealt = getattr(getattr(loader, "sampler", None), "num_replicas", groups)
    if dealt != groups:
        raise ValueError(
            f"a sampler that deals samples to {dealt} ranks, where {groups} are worked on at a "
            "time: leave it out, or give shardtensor.io.DomainSampler"
        )


def cut_batch(batch: Any, shard: Shard, domain: DeviceMesh) -> Any:
    """The batch on the mesh of a domain; without communication, for its ranks have all of it."""
    if shard is None:
        return batch
    if not isinstance(shard, int):
        return shard(batch, domain)
    return mapped(partial(_cut, dim=shard, mesh=domain), batch)


def _cut(x: Any, dim: int, mesh: DeviceMesh) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, ShardTensor) or not -x.ndim <= dim < x.ndim:
        return x
    return distribute_tensor(x, mesh, [dt.Shard(dim % x.ndim)], src_data_rank=None)
