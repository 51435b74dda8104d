"""How the parts of a call are cut, each with rows beside its own, and what they may return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from .._torch.world import middle_mesh
from ..cuts import chunk_sizes
from ..spec import ALONE
from ..tensor import ShardTensor

Span = tuple[int, int]
# the first row, the end, and the rows in all
Cut = tuple[int, int, int]


def spans_of(rows: int, parts: int) -> list[Span]:
    """The rows (start, stop) of each part; one without rows has nothing to do."""
    sizes = chunk_sizes(rows, parts)
    return [(a, a + n) for a, n in zip(sizes.offsets, sizes, strict=False) if n]


def middle(device: str, axes: int) -> DeviceMesh:
    """What tensors of a part lie on that does not meet others."""
    return middle_mesh(device, axes, (ALONE, *map(str, range(1, axes))))


def widened(span: Span, halo: int, rows: int) -> tuple[int, int, int]:
    """How many of all rows are before a part with its halo, in it, and behind it."""
    a, b = max(0, span[0] - halo), min(rows, span[1] + halo)
    return a, b - a, rows - b


def hides(y: Any) -> bool:
    """Whether a result may have tensors of a part where nobody looks for them."""
    inside = getattr(y, "__dict__", {}).values()
    return isinstance(y, Iterator) or any(isinstance(v, ShardTensor) for v in inside)


def check_plain(y: Any) -> None:
    """Raise ValueError for an output that is no tensor and has some."""
    if hides(y):
        raise ValueError(f"tensors in a {type(y).__name__}")


def cut_of(y: ShardTensor) -> dict[int, Cut]:
    """For each mesh axis that cuts a dim the first row here, the end, and the rows in all."""
    found = {}
    for dim, (a, b) in zip(y._spec.dims, y._spec.spans, strict=True):
        if dim.axes:
            # several axes in one dim raise
            (k,) = dim.axes
            found[k] = a, b, dim.size
    return found
