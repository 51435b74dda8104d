"""Reading samples straight into ShardTensors: each rank its own block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..later import dt
from ..spec import Spec
from ..tensor import ShardTensor
from .block import placed
from .well import WellFile


def read_sharded(
    file: WellFile,
    fields: Sequence[str],
    places: Sequence[tuple[int, int]],
    mesh: DeviceMesh,
    placements: Sequence[dt.Placement],
    *,
    sizes: Mapping[int, Sequence[int]] | None = None,
) -> ShardTensor:
    """Fields at some (trajectory, step), float32 (len(places), C, *spatial), on the mesh's device.

    placements: of that whole shape; each rank reads only the spatial block that it holds, and
    nothing is communicated. sizes: of the shards of a spatial dim (default: torch.chunk's). Raises
    ValueError for a placement that shards the places or the channels.
    """
    channels = file.channels(fields)
    shape = (len(places), channels, *file.shape)
    spec = Spec.of(mesh, placements, shape, sizes)
    if spec.dims[0].axes or spec.dims[1].axes or spec.partial:
        raise ValueError(f"read_sharded shards spatial dims only, not {spec.placements}")
    window = [
        (start, start + n) for start, n in zip(spec.offset[2:], spec.local_shape[2:], strict=True)
    ]
    blocks = [file.read(fields, trajectory, step, window) for trajectory, step in places]
    return placed(torch.stack(blocks), spec)
