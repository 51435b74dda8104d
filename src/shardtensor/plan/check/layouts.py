"""On which meshes, and cut how, `check` tries a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor

from ...comm.observers import simulated_rank
from ...later import dt


@dataclass
class Layout:
    """A mesh shape, the dims that it shards, and sizes of shards by dim if they are uneven."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    sizes: dict[int, Sequence[int]]

    def __str__(self) -> str:
        text = f"{' x '.join(map(str, self.shape))} ranks"
        for dim, sizes in self.sizes.items():
            text += f", dim {dim} in {list(sizes)}"
        return text

    @staticmethod
    def usual(axes: int) -> list[tuple[int, ...]]:
        """The mesh shapes that are tried, or that of the job."""
        if in_job():
            return [(1,) * (axes - 1) + (dist.get_world_size(),)]
        return [(2,), (3,)] if axes == 1 else [(2,) * axes]

    @classmethod
    def of(
        cls, x: Tensor, placements: Sequence[dt.Placement], shape: Sequence[int], uneven: bool
    ) -> Layout | None:
        """Uneven along the first dim that is cut; None where there is nothing to cut unevenly."""
        dims = tuple(p.dim % x.ndim for p in placements)  # type: ignore[attr-defined]
        if not uneven:
            return cls(tuple(shape), dims, {})
        ranks = prod(n for n, d in zip(shape, dims, strict=True) if d == dims[0])
        size = x.shape[dims[0]]
        if ranks < 2 or size < 2:
            return None
        sizes = [0] * ranks
        sizes[-1] = size // 3
        sizes[0] = size - sizes[-1]
        return cls(tuple(shape), dims, {dims[0]: sizes})


def in_job() -> bool:
    """Whether ranks are processes, and this is one of several."""
    return dist.is_initialized() and simulated_rank() is None and dist.get_world_size() > 1
