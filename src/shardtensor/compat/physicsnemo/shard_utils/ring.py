"""One step of a ring: a tensor to the next rank, another from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .... import comm


@dataclass
class RingPassingConfig:
    """Along which axis of the mesh and which way round. `communication_method` changes nothing."""

    mesh_dim: int
    mesh_size: int
    ring_direction: Literal["forward", "backward"] = "forward"
    communication_method: Literal["p2p", "a2a"] = "a2a"

    def __post_init__(self) -> None:
        if self.ring_direction not in ("forward", "backward"):
            raise ValueError(f"ring_direction {self.ring_direction!r}: forward or backward")


def perform_ring_iteration(
    tensor: Tensor,
    mesh: DeviceMesh,
    ring_config: RingPassingConfig,
    recv_shape: Sequence[int] | None = None,
) -> Tensor:
    """What the rank before has; differentiable. recv_shape: its shape, if not this one's."""
    group, n = comm.group(mesh, (ring_config.mesh_dim,)), mesh.size(ring_config.mesh_dim)
    shift = 1 if ring_config.ring_direction == "forward" else -1
    shape = list(tensor.shape if recv_shape is None else recv_shape)
    me = mesh.get_local_rank(ring_config.mesh_dim)
    # as vectors, since shapes may differ in several dims; those of other ranks are not asked for
    sizes = [0] * n
    sizes[me] = tensor.numel()
    if n > 1:
        sizes[(me - shift) % n] = 1
        for size in shape:
            sizes[(me - shift) % n] *= size
    return comm.ring(tensor.reshape(-1), 0, sizes, group, shift=shift).view(shape)


def perform_ring_iteration_async(
    tensor: Tensor,
    mesh: DeviceMesh,
    ring_config: RingPassingConfig,
    recv_tensor: Tensor | None = None,
    recv_shape: Sequence[int] | None = None,
) -> tuple[Tensor, list[Any]]:
    """`perform_ring_iteration`, into `recv_tensor` if given, and no handle to wait for."""
    shape = recv_shape if recv_tensor is None else recv_tensor.shape
    found = perform_ring_iteration(tensor, mesh, ring_config, shape)
    return (found if recv_tensor is None else recv_tensor.copy_(found)), []
