"""`sync_module_over_mesh`: one rank's weights on all ranks of an axis."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ... import _torch, comm
from ...comm import wire
from ...tensor import ShardTensor
from ...train.parallelize import synchronise


def sync_module_over_mesh(
    module: nn.Module, mesh: DeviceMesh, src_mesh_rank: int = 0, verify: bool = False
) -> None:
    """Give all ranks of a one-axis mesh the plain parameters and buffers of one of them.

    verify: names, shapes and dtypes are compared first, and bytes afterwards. Raises ValueError for
    a mesh of several axes or a rank outside of it, RuntimeError after fully_shard and where ranks
    differ.
    """
    if mesh.ndim != 1:
        raise ValueError(f"sync_module_over_mesh on {mesh}: give one axis, as in mesh['domain']")
    if not 0 <= src_mesh_rank < mesh.size():
        raise ValueError(f"src_mesh_rank {src_mesh_rank}: a rank of the mesh of {mesh.size()}")
    if any(isinstance(m, FSDPModule) for m in module.modules()):
        raise RuntimeError("sync_module_over_mesh after fully_shard: call it before")
    named = [*module.named_parameters(), *module.named_buffers()]
    plain = {k: x for k, x in named if not isinstance(x, DTensor | ShardTensor)}
    group = comm.group(mesh, (0,))
    if verify:
        facts = ", ".join(f"{k} {list(x.shape)} {x.dtype}" for k, x in plain.items())
        _compare(facts.encode(), mesh, group, "names, shapes or dtypes of parameters")
    synchronise(plain.values(), group, src_mesh_rank)
    if verify:
        _compare(b"".join(map(_bytes, plain.values())), mesh, group, "values of parameters")


def _bytes(x: Tensor) -> bytes:
    parts = (y.detach().cpu().contiguous() for y in _torch.dense_parts(x))
    return b"".join(y.reshape(-1).view(torch.uint8).numpy().tobytes() for y in parts)


def _compare(data: bytes, mesh: DeviceMesh, group: str, what: str) -> None:
    """Raise RuntimeError on every rank unless all have the same bytes."""
    checks = wire.all_gather_numbers([zlib.crc32(data)], mesh.device_type, group)
    if any(c != checks[0] for c in checks):
        raise RuntimeError(f"sync_module_over_mesh: ranks have different {what}")
