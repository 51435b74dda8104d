"""Rows of the neighbours around this rank's local tensor, and without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .... import comm
from ....comm import wire


@dataclass
class HaloConfig:
    """Along which axis of the mesh and dim of the tensor, and how many rows on each side.

    edge_padding_size: rows of zeros at the outer edges. The last two fields change nothing.
    """

    mesh_dim: int
    tensor_dim: int
    halo_size: int
    edge_padding_size: int = 0
    async_op: bool = False
    communication_method: Literal["p2p", "a2a"] = "a2a"


def halo_padding(tensor: Tensor, mesh: DeviceMesh, halo_config: HaloConfig) -> Tensor:
    """The local tensor with its neighbours' rows; differentiable.

    Shards may have any sizes, which one small all-gather learns. Raises ValueError where a rank's
    neighbours have fewer rows than `halo_size`.
    """
    dim = halo_config.tensor_dim % tensor.ndim
    halo, group = halo_config.halo_size, comm.group(mesh, (halo_config.mesh_dim,))
    found = wire.all_gather_numbers([tensor.shape[dim]], tensor.device, group)
    sizes = [n for (n,) in found]
    ends = [0, *(sum(sizes[: i + 1]) for i in range(len(sizes)))]
    inner = range(1, len(sizes))
    if any(ends[i] < halo or ends[-1] - ends[i] < halo for i in inner):
        raise ValueError(f"halo of {halo} rows for shards of {sizes}: not as many beside a rank")
    last = len(sizes) - 1
    windows = [
        (ends[i] - halo * (i > 0), ends[i + 1] + halo * (i < last)) for i in range(len(sizes))
    ]
    padded = comm.window(tensor, dim, sizes, windows, group)
    before, after = _edges(mesh, halo_config)
    return F.pad(padded, [0, 0] * (tensor.ndim - 1 - dim) + [before, after])


def unhalo_padding(tensor: Tensor, mesh: DeviceMesh, halo_config: HaloConfig) -> Tensor:
    """The rows of a padded tensor that are this rank's own; differentiable."""
    me, halo = mesh.get_local_rank(halo_config.mesh_dim), halo_config.halo_size
    last = mesh.size(halo_config.mesh_dim) - 1
    before, after = _edges(mesh, halo_config)
    before, after = before + halo * (me > 0), after + halo * (me < last)
    dim = halo_config.tensor_dim
    return tensor.narrow(dim, before, tensor.shape[dim] - before - after)


def _edges(mesh: DeviceMesh, config: HaloConfig) -> tuple[int, int]:
    """Rows of zeros before and after this rank's."""
    me, last = mesh.get_local_rank(config.mesh_dim), mesh.size(config.mesh_dim) - 1
    return config.edge_padding_size * (me == 0), config.edge_padding_size * (me == last)
