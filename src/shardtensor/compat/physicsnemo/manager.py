"""`DistributedManager`: the process group, and meshes by shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...train.launch import init, place


class DistributedManager:
    """Ranks, device and meshes of this run; all instances are alike.

    Groups by name (`group`, `create_process_subgroup`) are not here: meshes have them.
    """

    @staticmethod
    def initialize() -> None:
        """Start torch.distributed as the launcher says, if it does not run yet."""
        init()

    @classmethod
    def is_initialized(cls) -> bool:
        return dist.is_initialized()

    @staticmethod
    def cleanup(barrier: bool = False) -> None:
        """End torch.distributed, after all ranks have come here if `barrier`."""
        if dist.is_initialized():
            if barrier:
                dist.barrier()
            dist.destroy_process_group()

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def local_rank(self) -> int:
        return place().local_rank

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def broadcast_buffers(self) -> bool:
        """What to give to DDP."""
        return False

    @property
    def find_unused_parameters(self) -> bool:
        """What to give to DDP."""
        return False

    @property
    def global_mesh(self) -> DeviceMesh:
        """A mesh of one axis over all ranks."""
        return self.initialize_mesh((-1,), ("world",))

    def initialize_mesh(
        self, mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]
    ) -> DeviceMesh:
        """A mesh over all ranks; one size may be -1, for all that are left.

        Raises ValueError where names and sizes do not fit each other or the ranks.
        """
        if len(mesh_shape) != len(mesh_dim_names):
            raise ValueError(f"mesh shape {mesh_shape} with names {mesh_dim_names}")
        mesh, _ = init(**dict(zip(mesh_dim_names, mesh_shape, strict=True)))
        return mesh

    def get_mesh_group(self, mesh: DeviceMesh) -> dist.ProcessGroup:
        """The process group of all ranks of a mesh."""
        if mesh.ndim == 1:
            return mesh.get_group()
        return mesh._flatten().get_group()
