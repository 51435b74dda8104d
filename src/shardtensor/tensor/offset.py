"""Where in its memory a tensor begins on one device: known of what no slice is.

A view has all elements of its base, or is a slice of it. So memory of which slices were taken
remembers how many elements the whole has; a copy that stands for a view, what it is a view of.
"""

from __future__ import annotations

import torch

from .. import _torch
from . import layout
from .aliases import begins
from .shard_tensor import ShardTensor


def take_rows(x: ShardTensor) -> None:
    """Note that views of a tensor begin elsewhere in its memory than it does."""
    local = x._local
    if local.layout is torch.strided:
        memory = _torch.storage(local)
        if not hasattr(memory, "_shardtensor_whole"):
            memory._shardtensor_whole = x.numel(), x.dtype  # type: ignore[attr-defined]


def copy_place(x: ShardTensor, copy: ShardTensor) -> None:
    """Note of a copy of all memory of x, not of its rows alone, that it begins where x does."""
    if not begins_its_memory(x):
        # no tensor of this memory is known to be the whole
        _torch.storage(copy._local)._shardtensor_whole = ()  # type: ignore[attr-defined]


def begins_its_memory(x: ShardTensor) -> bool:
    """Whether the whole begins its memory on one device; False where that is not known."""
    return (
        x._slice is None
        and not layout.overlaps(x)
        and begins(_torch.storage(x._local), (x.numel(), x.dtype))
    )
