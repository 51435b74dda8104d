"""Memory of a step: what is allocated at its peak, what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import probe
from ..comm.observers import simulated_rank


def peak_bytes(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that step() held at once beyond those alive before it.

    Raises ValueError in a simulated rank: its process is all ranks'.
    """
    if simulated_rank() is not None:
        raise ValueError("peak_bytes of a simulated rank: run ranks as processes")
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = most = 0
    for nbytes in probe.allocations(step):
        held += nbytes
        most = max(most, held)
    return most


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of distinct storages that forward() keeps for backward, parameters not counted."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        # checkpointing keeps ShardTensors
        local = getattr(x, "_local", x)
        if not (local.is_leaf and local.requires_grad):
            storage = local.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(forward())
    return sum(kept.values())
