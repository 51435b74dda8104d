"""What is kept for backward waits in host memory; a GPU's copies travel while it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Inside, what autograd keeps is moved to host memory, and comes back for backward."""

    def __init__(self) -> None:
        super().__init__(away, back)


class Kept(NamedTuple):
    """A tensor in host memory, the device that it comes back to, and its version here."""

    host: Tensor
    device: torch.device
    version: int


def away(x: Tensor) -> Kept:
    """x in host memory. Nothing waits for the GPU: its stream copies, from there to pinned memory.

    The stream also keeps order with whatever gets the memory of x next.
    """
    if x.device.type == "cpu":
        # no copy, so it must stay as it is
        return Kept(x, x.device, x._version)
    if x.device.type != "cuda" or x.layout is not torch.strided:
        return Kept(x.cpu(), x.device, 0)
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    host.copy_(x, non_blocking=True)
    return Kept(host, x.device, 0)


def back(kept: Kept) -> Tensor:
    """The tensor on its device. Raises RuntimeError if it was kept here and written to."""
    if kept.device.type == "cpu":
        if kept.host._version != kept.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {list(kept.host.shape)} of {kept.host.dtype}, which offload "
                "keeps for backward; use the op that returns a new tensor"
            )
        return kept.host
    return kept.host.to(kept.device, non_blocking=True)
