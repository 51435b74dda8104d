"""Gradients of parameters that are summed over the ranks later, many in one message.

`vary` of a parameter that has a slot leaves this rank's part of the gradient as it is, and notes it
in the slot. Whoever made the slot (`parallelize`) sums what the slots hold over the ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops


class Slot(Protocol):
    """Where the part of a parameter's gradient goes that is still to be summed over `group`."""

    group: str

    def add(self, part: Tensor) -> Tensor:
        """One more part; returns what the parameter's own gradient gets of it."""


def slot_of(x: Tensor, group: str) -> Slot | None:
    """The slot of a parameter, or of a DTensor parameter's local tensor, whose gradient is summed
    over this group later.
    """
    slot = getattr(x, "_shardtensor_slot", None)
    return slot if slot is not None and slot.group == group else None


class Defer(torch.autograd.Function):
    """The identity; backward gives the gradient to the slot and passes on what that returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Slot) -> Tensor:
        ctx.slot = slot
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            # a gradient of this gradient is wanted: it must be whole now
            (whole,) = ops.reduce_op([g], "sum", ctx.slot.group)
            return whole, None
        return ctx.slot.add(g), None
